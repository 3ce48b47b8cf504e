//! The HTTP server under the git server and the tests of feeds.

use std::io::Read;
use std::time::{Duration, Instant};

use testing::http_server::{HttpServer, Response};

use crate::raw_http::{exchange, finish, get, head, send};

#[test]
fn answers_what_its_closure_says_and_remembers_what_it_was_asked() {
    let server = HttpServer::start(|request| match request.path.as_str() {
        "/feed" => Response::json(&serde_json::json!([1])),
        _ => Response::new(404, "no").header("x-why", "because"),
    });
    let feed = get(&server.authority(), "/feed?page=2");
    assert_eq!((feed.status, feed.body.as_slice()), (200, &b"[1]"[..]));
    assert!(feed.has_header("content-type: application/json"));
    assert!(feed.has_header("content-length: 3"));

    let mut request = head("POST", "/other", "content-length: 4\r\nX-Token: t\r\n");
    request.extend(b"body");
    let other = exchange(&server.authority(), &request).unwrap();
    assert_eq!(other.status, 404);
    assert!(other.has_header("x-why: because"));

    assert_eq!(server.request_count(), 2);
    let seen = server.requests();
    assert_eq!(
        (seen[0].path.as_str(), seen[0].query.as_str()),
        ("/feed", "page=2")
    );
    assert_eq!(
        (seen[1].method.as_str(), &seen[1].body[..]),
        ("POST", &b"body"[..])
    );
    assert_eq!(seen[1].header("x-token"), Some("t"));
}

#[test]
fn answers_badly_on_request() {
    let server = HttpServer::start(|request| match request.path.as_str() {
        "/cut" => Response::new(200, "0123456789").cut(4),
        "/late" => Response::new(200, "").after(Duration::from_millis(30)),
        "/dripped" => Response::new(200, "0123456789").dripped(100),
        "/reset" => Response::reset(),
        _ => Response::new(404, ""),
    });
    let cut = get(&server.authority(), "/cut");
    assert_eq!((cut.body.as_slice(), cut.whole), (&b"0123"[..], false));
    assert!(cut.has_header("content-length: 10"));

    let started = Instant::now();
    assert_eq!(get(&server.authority(), "/late").status, 200);
    assert!(started.elapsed() >= Duration::from_millis(30));

    let started = Instant::now();
    let dripped = get(&server.authority(), "/dripped");
    assert_eq!(
        (dripped.body.as_slice(), dripped.whole),
        (&b"0123456789"[..], true)
    );
    assert!(started.elapsed() >= Duration::from_millis(100));

    let reset = exchange(&server.authority(), &head("GET", "/reset", "")).unwrap_err();
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn an_endless_answer_lasts_until_the_client_has_enough() {
    let server = HttpServer::start(|_| Response::endless("[", "1,"));
    let mut connection = send(&server.authority(), &head("GET", "/", "")).unwrap();
    let mut enough = vec![0; 1 << 20];
    connection.read_exact(&mut enough).unwrap();
    drop(connection);
    let mut other = send(&server.authority(), &head("GET", "/", "")).unwrap();
    other.read_exact(&mut enough).unwrap();
}

#[test]
fn dropping_it_ends_requests_that_hang() {
    let server = HttpServer::start(|_| Response::hang());
    let authority = server.authority();
    let connections = [(); 3].map(|()| send(&authority, &head("GET", "/", "")).unwrap());
    server.wait_for_requests(3);
    assert_eq!(server.max_concurrent(), 3);
    drop(server);
    for connection in connections {
        assert!(finish(connection).is_err());
    }
    // The port is free again.
    std::net::TcpListener::bind(authority).unwrap();
}

#[tokio::test]
async fn starts_and_ends_inside_an_asynchronous_test() {
    let server = HttpServer::start(|_| Response::new(200, "x"));
    let authority = server.authority();
    let reply = tokio::task::spawn_blocking(move || get(&authority, "/")).await;
    assert_eq!(reply.unwrap().body, b"x");
}
