//! Spans as OTLP has them: the messages of `opentelemetry/proto/trace/v1/trace.proto`, in the binary form.
//! The numbers are fields'.

use std::borrow::Cow;

/// What a span is to the process that it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It talks to none.
    Internal = 1,
    /// It asks one, and waits.
    Client = 3,
    /// It leaves work for one.
    Producer = 4,
    /// It does work that one left.
    Consumer = 5,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A text.
    Text(Cow<'static, str>),
    /// A number.
    Number(i64),
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number.try_into().unwrap_or(i64::MAX))
    }
}

/// A span that has ended. Times are nanoseconds of Unix time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SpanRecord {
    pub(super) trace_id: u128,
    pub(super) span_id: u64,
    pub(super) parent: Option<u64>,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) begin: u64,
    pub(super) end: u64,
    pub(super) attributes: Vec<(&'static str, Value)>,
    /// Why it failed, if it did.
    pub(super) error: Option<String>,
}

/// A status of this code is an error.
const STATUS_ERROR: u64 = 2;

/// Encodes a request to take `spans`, which all are of the process that `resource` describes.
pub(super) fn request(resource: &[(String, String)], spans: &[SpanRecord]) -> Vec<u8> {
    let mut of_resource = Vec::new();
    for (key, value) in resource {
        attribute(&mut of_resource, 1, key, &value.clone().into());
    }
    let mut scope = Vec::new();
    bytes(&mut scope, 1, b"repofleet");
    bytes(&mut scope, 2, env!("CARGO_PKG_VERSION").as_bytes());
    let mut of_scope = Vec::with_capacity(512 * spans.len());
    bytes(&mut of_scope, 1, &scope);
    let mut message = Vec::with_capacity(1024);
    for record in spans {
        message.clear();
        span(&mut message, record);
        bytes(&mut of_scope, 2, &message);
    }
    let mut of_process = Vec::with_capacity(of_scope.len() + of_resource.len() + 32);
    bytes(&mut of_process, 1, &of_resource);
    bytes(&mut of_process, 2, &of_scope);
    let mut request = Vec::with_capacity(of_process.len() + 16);
    bytes(&mut request, 1, &of_process);
    request
}

fn span(out: &mut Vec<u8>, record: &SpanRecord) {
    bytes(out, 1, &record.trace_id.to_be_bytes());
    bytes(out, 2, &record.span_id.to_be_bytes());
    if let Some(parent) = record.parent {
        bytes(out, 4, &parent.to_be_bytes());
    }
    bytes(out, 5, record.name.as_bytes());
    number(out, 6, record.kind as u64);
    fixed(out, 7, record.begin);
    fixed(out, 8, record.end);
    for (key, value) in &record.attributes {
        attribute(out, 9, key, value);
    }
    if let Some(why) = &record.error {
        head(out, 15, size(why.len()) + 2);
        bytes(out, 2, why.as_bytes());
        number(out, 3, STATUS_ERROR);
    }
}

/// There are dozens for each job, so nothing is copied to learn its length.
fn attribute(out: &mut Vec<u8>, field: u64, key: &str, value: &Value) {
    let length = match value {
        Value::Text(text) => size(text.len()),
        Value::Number(value) => 1 + varint_size(value.cast_unsigned()),
    };
    head(out, field, size(key.len()) + size(length));
    bytes(out, 1, key.as_bytes());
    head(out, 2, length);
    match value {
        Value::Text(text) => bytes(out, 1, text.as_bytes()),
        Value::Number(value) => number(out, 3, value.cast_unsigned()),
    }
}

/// The size of a field of so many bytes.
fn size(length: usize) -> usize {
    1 + varint_size(length as u64) + length
}

fn varint_size(value: u64) -> usize {
    (value | 1).ilog2() as usize / 7 + 1
}

/// What is before the content of a field.
fn head(out: &mut Vec<u8>, field: u64, length: usize) {
    varint(out, field << 3 | 2);
    varint(out, length as u64);
}

/// A text, bytes or a message.
fn bytes(out: &mut Vec<u8>, field: u64, content: &[u8]) {
    head(out, field, content.len());
    out.extend_from_slice(content);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

/// A number of eight bytes.
fn fixed(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
