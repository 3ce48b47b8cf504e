//! An HTTP client that shows what came over the wire and how it ended.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// A response, up to the end of the connection.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Status line and headers, in lower case.
    pub(crate) head: String,
    /// The body that came, unchunked.
    pub(crate) body: Vec<u8>,
    /// Whether the body came whole.
    pub(crate) whole: bool,
}

impl Reply {
    pub(crate) fn has_header(&self, line: &str) -> bool {
        self.head.lines().any(|header| header == line)
    }
}

/// Sends a request and reads until the connection ends.
pub(crate) fn exchange(authority: &str, request: &[u8]) -> io::Result<Reply> {
    finish(send(authority, request)?)
}

pub(crate) fn get(authority: &str, path: &str) -> Reply {
    exchange(authority, &head("GET", path, "")).unwrap()
}

/// Sends a request and leaves reading to the caller.
pub(crate) fn send(authority: &str, request: &[u8]) -> io::Result<TcpStream> {
    let mut connection = TcpStream::connect(authority)?;
    connection.write_all(request)?;
    Ok(connection)
}

/// Reads until the connection ends in any way.
pub(crate) fn finish(mut connection: TcpStream) -> io::Result<Reply> {
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes)?;
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let Some(end) = end else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    let head = String::from_utf8(bytes[..end].to_ascii_lowercase()).unwrap();
    let rest = &bytes[end + 4..];
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let (body, whole) = match length {
        Some(length) => (rest.to_vec(), length.parse() == Ok(rest.len())),
        None => unchunk(rest),
    };
    Ok(Reply {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head,
        body,
        whole,
    })
}

/// Returns a request up to its body. `headers` end with `\r\n` each.
pub(crate) fn head(method: &str, path: &str, headers: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n").into()
}

fn unchunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|two| two == b"\r\n") {
        let size = std::str::from_utf8(&rest[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return (body, true);
        }
        rest = &rest[end + 2..];
        body.extend_from_slice(&rest[..size.min(rest.len())]);
        rest = rest.get(size + 2..).unwrap_or_default();
    }
    (body, false)
}
