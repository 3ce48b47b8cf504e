//! A collector of traces. It reads OTLP with a reader of its own, so that no mistake of the writer is
//! repeated.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::http_server::{HttpServer, Request, Response};

/// A collector on a free port on 127.0.0.1 until it is dropped.
#[derive(Debug)]
pub struct Collector {
    server: HttpServer,
}

/// A span as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// `service.name` of the process that sent it.
    pub service: String,
    /// In hexadecimal, as the next two.
    pub trace_id: String,
    /// Of this span.
    pub span_id: String,
    /// Of the span that it is a part of; empty if it is none's.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// 1 internal, 3 client, 4 producer, 5 consumer.
    pub kind: u64,
    /// Nanoseconds of Unix time.
    pub begin: u64,
    /// As `begin`.
    pub end: u64,
    /// All values as texts.
    pub attributes: BTreeMap<String, String>,
    /// The message of its status, if that is an error.
    pub error: Option<String>,
}

impl Span {
    /// Returns an attribute; empty if there is none.
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }

    /// Returns how long it took.
    pub fn duration(&self) -> Duration {
        Duration::from_nanos(self.end - self.begin)
    }
}

impl Collector {
    /// Starts a collector that takes everything.
    pub fn start() -> Self {
        Self::answering(|_| Response::new(200, ""))
    }

    /// Starts a collector with these answers.
    pub fn answering(answer: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        Self {
            server: HttpServer::start(answer),
        }
    }

    /// Returns `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        self.server.url()
    }

    /// Returns every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.server.requests()
    }

    /// Returns every span so far.
    ///
    /// # Panics
    /// If anything received is not OTLP.
    pub fn spans(&self) -> Vec<Span> {
        let requests = self.server.requests();
        requests.iter().flat_map(|r| read(&r.body)).collect()
    }
}

/// A field's value on the wire.
#[derive(Clone, Copy)]
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Wire<'a> {
    fn number(self) -> u64 {
        match self {
            Self::Number(number) => number,
            Self::Bytes(_) => panic!("bytes where a number belongs"),
        }
    }

    fn bytes(self) -> &'a [u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Number(_) => panic!("a number where bytes belong"),
        }
    }

    fn text(self) -> String {
        String::from_utf8(self.bytes().to_vec()).expect("a text is UTF-8")
    }

    fn hex(self) -> String {
        self.bytes().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// The fields of a message in protobuf's binary form.
fn fields(mut message: &[u8]) -> Vec<(u64, Wire<'_>)> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let tag = take_varint(&mut message);
        let wire = match tag & 7 {
            0 => Wire::Number(take_varint(&mut message)),
            1 => {
                let bytes = take(&mut message, 8);
                Wire::Number(u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
            }
            2 => {
                let length = take_varint(&mut message);
                Wire::Bytes(take(&mut message, length as usize))
            }
            other => panic!("no wire type of ours: {other}"),
        };
        fields.push((tag >> 3, wire));
    }
    fields
}

fn take<'a>(message: &mut &'a [u8], count: usize) -> &'a [u8] {
    message.split_off(..count).expect("the message goes on")
}

fn take_varint(message: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(message, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
    }
    panic!("a number without an end")
}

/// The fields of this number.
fn all(message: &[u8], number: u64) -> impl Iterator<Item = Wire<'_>> {
    let fields = fields(message).into_iter();
    fields.filter_map(move |(n, wire)| (n == number).then_some(wire))
}

fn one(message: &[u8], number: u64) -> Option<Wire<'_>> {
    all(message, number).next()
}

/// Reads an `ExportTraceServiceRequest`.
fn read(request: &[u8]) -> Vec<Span> {
    let mut spans = Vec::new();
    for process in all(request, 1).map(Wire::bytes) {
        let resource = one(process, 1).expect("a resource").bytes();
        let service = attributes(resource, 1).remove("service.name");
        let service = service.expect("service.name");
        for scope in all(process, 2).map(Wire::bytes) {
            let of_scope = all(scope, 2).map(|span| read_span(span.bytes(), &service));
            spans.extend(of_scope);
        }
    }
    spans
}

fn read_span(span: &[u8], service: &str) -> Span {
    let field = |number: u64| one(span, number).expect("a field of every span");
    let status = one(span, 15).map(|status| {
        let status = status.bytes();
        assert_eq!(one(status, 3).map(Wire::number), Some(2), "an error");
        one(status, 2).expect("a message").text()
    });
    let (trace_id, span_id) = (field(1).hex(), field(2).hex());
    assert_eq!((trace_id.len(), span_id.len()), (32, 16));
    Span {
        service: service.to_owned(),
        trace_id,
        span_id,
        parent: one(span, 4).map(Wire::hex).unwrap_or_default(),
        name: field(5).text(),
        kind: field(6).number(),
        begin: field(7).number(),
        end: field(8).number(),
        attributes: attributes(span, 9),
        error: status,
    }
}

fn attributes(message: &[u8], number: u64) -> BTreeMap<String, String> {
    let pairs = all(message, number).map(Wire::bytes);
    let pairs = pairs.map(|pair| {
        let value = one(pair, 2).expect("a value").bytes();
        let value = match fields(value)[..] {
            [(1, text)] => text.text(),
            [(3, number)] => number.number().to_string(),
            _ => panic!("neither a text nor a number"),
        };
        (one(pair, 1).expect("a key").text(), value)
    });
    pairs.collect()
}
