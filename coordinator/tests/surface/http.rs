//! The API's server, by raw bytes and by the command's own client.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use spillway_coordinator::api::{Client, Limits};
use spillway_coordinator::model::{Done, Event, Status, Workload, Workloads};

use crate::fake::{Node, event};

const SECOND: Duration = Duration::from_secs(1);

fn connect(node: &Node) -> UnixStream {
    let stream = UnixStream::connect(node.api()).expect("connect");
    stream.set_read_timeout(Some(10 * SECOND)).expect("timeout");
    stream
}

/// Sends bytes and nothing after them, and reads until the server closes.
fn raw(node: &Node, bytes: &[u8]) -> String {
    let mut stream = connect(node);
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).expect("UTF-8")
}

fn status_of(answer: &str) -> u16 {
    let code = answer.split(' ').nth(1).unwrap_or_default();
    code.parse()
        .unwrap_or_else(|_| panic!("no status in {answer:?}"))
}

fn body_of(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").expect("a head and a body").1
}

fn get(target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").into_bytes()
}

fn assert_serves(node: &Node) {
    assert_eq!(status_of(&raw(node, &get("/v1/status"))), 200);
}

#[test]
fn every_route_answers() {
    let node = Node::start();
    let client = Client::new(node.api());
    let ask = |method: &str, target: &str| client.ask(method, target, 10 * SECOND).expect(target);

    let status: Status = serde_json::from_slice(&ask("GET", "/v1/status").body).expect("status");
    assert_eq!(status.devices[0].name, "Test GPU");
    let all: Workloads = serde_json::from_slice(&ask("GET", "/v1/workloads").body).expect("list");
    assert_eq!(all.workloads.len(), 2);
    let one = ask("GET", "/v1/workloads/a%2Fb:1");
    let one: Workload = serde_json::from_slice(&one.body).expect("a workload");
    assert_eq!(one.name, "a/b:1");
    for verb in ["evict", "restore"] {
        let done = ask(
            "POST",
            &format!("/v1/workloads/a%2Fb%3A1/{verb}?timeout=1.5"),
        );
        let done: Done = serde_json::from_slice(&done.body).expect("done");
        assert_eq!((done.name.as_str(), done.bytes), ("a/b:1", 1 << 30));
    }
    let metrics = String::from_utf8(ask("GET", "/metrics").body).expect("UTF-8");
    assert!(metrics.contains("\nspillway_limit_bytes{workload=\"a/b:1\",device=\"0\""));
}

#[test]
fn errors_have_their_status_and_say_what_to_do() {
    let node = Node::start();
    let client = Client::new(node.api());
    for (method, target, status, says) in [
        ("GET", "/", 404, "/v1/status"),
        ("GET", "/v1/status/", 404, "nothing here"),
        (
            "GET",
            "/v1/workloads/none",
            404,
            "no workload is named \"none\"",
        ),
        ("GET", "/v1/workloads/a/b:1", 404, "%2F"),
        ("GET", "/v1/workloads/", 404, "nothing here"),
        ("GET", "/v1/workloads/%zz", 400, "broken % escape"),
        ("GET", "/v1/workloads/%ff", 400, "UTF-8"),
        ("GET", "/v1/status?x=1", 400, "unknown parameter"),
        ("GET", "/v1/events?follow=maybe", 400, "write 0 or 1"),
        ("GET", "/v1/events?folow=0", 400, "this path takes follow"),
        ("POST", "/v1/status", 405, "GET, HEAD"),
        ("DELETE", "/v1/workloads/busy", 405, "GET, HEAD"),
        ("GET", "/v1/workloads/busy/evict", 405, "POST"),
        ("BREW", "/metrics", 405, "GET, HEAD"),
        ("POST", "/v1/workloads/none/evict", 404, "no workload none"),
        ("POST", "/v1/workloads/busy/evict", 409, "a kernel runs"),
        (
            "POST",
            "/v1/workloads/slow/restore?timeout=0.05",
            504,
            "not done",
        ),
        ("POST", "/v1/workloads/ending/evict", 503, "ending"),
        ("POST", "/v1/workloads/busy/evict?timeout=0", 400, "timeout"),
        (
            "POST",
            "/v1/workloads/busy/evict?timeout=nan",
            400,
            "timeout",
        ),
        (
            "POST",
            "/v1/workloads/busy/evict?timeout=1e300",
            400,
            "timeout",
        ),
        ("POST", "/v1/workloads/panics/evict", 500, "internal error"),
    ] {
        let answer = client.ask(method, target, 10 * SECOND).expect(target);
        assert_eq!(answer.status, status, "{method} {target}");
        let json: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
        let text = json["error"].as_str().expect("an error text");
        assert!(text.contains(says), "{method} {target}: {text}");
    }
    let answer = raw(
        &node,
        b"POST /v1/status HTTP/1.1\r\nConnection: close\r\n\r\n",
    );
    assert!(answer.contains("\r\nAllow: GET, HEAD\r\n"), "{answer}");
}

#[test]
fn what_is_not_http_is_refused_and_harms_nobody() {
    let node = Node::start();
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(17_000));
    let long_target = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
    let big = format!(
        "POST /v1/status HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        65 * 1024
    );
    let mut big_chunks = b"POST /v1/status HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..17 {
        big_chunks.extend_from_slice(b"1000\r\n");
        big_chunks.extend_from_slice(&[b'x'; 4096]);
        big_chunks.extend_from_slice(b"\r\n");
    }
    let post = |rest: &str| format!("POST /v1/status HTTP/1.1\r\n{rest}").into_bytes();
    let cases: Vec<(Vec<u8>, u16)> = vec![
        (b"GARBAGE\r\n\r\n".to_vec(), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01".to_vec(), 400),
        (b"GET /v1/status HTTP/2.0\r\n\r\n".to_vec(), 400),
        (b"GET /v1/status HTTP/1.1\r\nno colon\r\n\r\n".to_vec(), 400),
        (b"GET /v1/status HTTP/1.1\r\nA: \0\r\n\r\n".to_vec(), 400),
        (b"GET v1/status HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"OPTIONS * HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"GET /v1/status HTTP/1.1\r\nHost: cut o".to_vec(), 400),
        (post("Content-Length: ten\r\n\r\n"), 400),
        (post("Content-Length: -1\r\n\r\n"), 400),
        (post("Content-Length: 99999999999999999999\r\n\r\n"), 400),
        (
            post("Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
            400,
        ),
        (
            post("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            400,
        ),
        (post("Transfer-Encoding: gzip\r\n\r\n"), 501),
        (post("Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"), 400),
        (
            post("Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n"),
            400,
        ),
        (post("Transfer-Encoding: chunked\r\n\r\n5\r\nab"), 400),
        (post("Content-Length: 10\r\n\r\nabc"), 400),
        (long.into_bytes(), 431),
        (long_target.into_bytes(), 431),
        (many.into_bytes(), 431),
        (big.into_bytes(), 413),
        (big_chunks, 413),
    ];
    for (bytes, status) in cases {
        let answer = raw(&node, &bytes);
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        assert_eq!(status_of(&answer), status, "{start:?}: {answer}");
        // After a request whose end is unknown nothing else on the connection can be trusted.
        let readable = start.starts_with("GET v1") || start.starts_with("OPTIONS");
        let closed = answer.contains("\r\nConnection: close\r\n");
        assert_eq!(closed, !readable, "{start:?}");
        let json: serde_json::Value = serde_json::from_str(body_of(&answer)).expect("JSON");
        assert!(json["error"].is_string(), "{start:?}: {answer}");
    }
    assert_serves(&node);
}

/// Whatever a client sends, the server answers or closes, and goes on. A fixed seed: the same bytes
/// every time.
#[test]
fn noise_harms_nobody() {
    let node = Node::start();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let request = b"POST /v1/workloads/busy/evict HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
    for _ in 0..300 {
        let mut bytes = request.to_vec();
        for _ in 0..=random() % 4 {
            let at = usize::try_from(random() % bytes.len() as u64).expect("small");
            bytes[at] = random().to_le_bytes()[0];
        }
        let answer = raw(&node, &bytes);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1."),
            "{answer}"
        );
    }
    assert_serves(&node);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let node = Node::start();
    let mut bytes = Vec::new();
    for request in [
        "\r\nGET /v1/workloads/busy HTTP/1.1\r\n\r\n",
        "POST /v1/workloads/busy/evict HTTP/1.1\r\nContent-Length: 5\r\n\r\nGET /",
        "POST /v1/workloads/none/evict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: v\r\n\r\n",
        "HEAD /v1/status HTTP/1.1\r\n\r\n",
        "GET /v1/events?follow=0 HTTP/1.1\r\n\r\n",
        "GET http://localhost/metrics HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /never HTTP/1.1\r\n\r\n",
    ] {
        bytes.extend_from_slice(request.as_bytes());
    }
    let answer = raw(&node, &bytes);
    let codes: Vec<_> = answer
        .match_indices("HTTP/1.1 ")
        .map(|(at, _)| &answer[at + 9..at + 12])
        .collect();
    assert_eq!(
        codes,
        ["200", "409", "404", "200", "200", "200"],
        "{answer}"
    );
    assert!(
        answer.contains("\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: text/plain"),
        "{answer}"
    );
}

#[test]
fn one_connection_serves_many_and_http10_one() {
    let node = Node::start();
    let mut stream = connect(&node);
    for _ in 0..20 {
        stream
            .write_all(b"GET /v1/workloads HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("open");
        let mut head = Vec::new();
        let mut byte = [0u8];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).expect("a head");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).expect("UTF-8");
        let length = head.split("Content-Length: ").nth(1).expect("a length");
        let length = length
            .split('\r')
            .next()
            .and_then(|l| l.parse().ok())
            .expect("a number");
        let mut body = vec![0u8; length];
        stream.read_exact(&mut body).expect("a body");
        assert!(serde_json::from_slice::<Workloads>(&body).is_ok());
    }
    let answer = raw(
        &node,
        b"GET /v1/events?follow=0 HTTP/1.0\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    );
    assert_eq!(answer.matches("HTTP/1.").count(), 1, "{answer}");
    assert!(!answer.contains("chunked"), "{answer}");
    assert_eq!(body_of(&answer).lines().count(), 2);
}

#[test]
fn a_hundred_connections_at_once() {
    let node = Node::start();
    let mut open: Vec<_> = (0..100).map(|_| connect(&node)).collect();
    for stream in &mut open {
        stream.write_all(&get("/v1/status")).expect("open");
    }
    for stream in &mut open {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert_eq!(status_of(&answer), 200);
    }
}

#[test]
fn one_connection_too_many_is_told_so() {
    let node = Node::with(Limits {
        connections: 4,
        ..Limits::default()
    });
    let mut held: Vec<_> = (0..4).map(|_| connect(&node)).collect();
    for stream in &mut held {
        stream
            .write_all(b"GET /v1/status HTTP/1.1\r\n\r\n")
            .expect("open");
        stream.read_exact(&mut [0u8; 15]).expect("served");
    }
    assert_eq!(status_of(&raw(&node, &get("/v1/status"))), 503);
    drop(held);
    let end = Instant::now() + 5 * SECOND;
    while status_of(&raw(&node, &get("/v1/status"))) != 200 {
        assert!(Instant::now() < end, "places are not given back");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_slow_request_has_a_deadline() {
    let node = Node::with(Limits {
        request: SECOND / 4,
        idle: SECOND / 2,
        ..Limits::default()
    });
    let started = Instant::now();
    let mut stream = connect(&node);
    let slow = stream.try_clone().expect("clone");
    std::thread::spawn(move || {
        let mut slow = slow;
        for byte in b"GET /v1/status HTTP/1.1\r\nHost: somewhere-far-away"
            .iter()
            .cycle()
        {
            if slow.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(status_of(&String::from_utf8_lossy(&answer)), 408);
    assert!(started.elapsed() < 3 * SECOND, "{:?}", started.elapsed());

    // One that sends nothing at all is closed without a word.
    let mut silent = connect(&node);
    let mut answer = Vec::new();
    silent.read_to_end(&mut answer).expect("closed");
    assert_eq!(answer, b"");
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + 10 * SECOND;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn events_come_kept_first_then_live() {
    let node = Node::start();
    let client = Client::new(node.api());
    let mut kept = Vec::new();
    let ended = client.lines("/v1/events?follow=0", &mut |line| {
        kept.push(serde_json::from_str::<Event>(line).expect("an event"));
        ControlFlow::Continue(())
    });
    assert!(ended.expect("a proper end").is_none());
    assert_eq!(kept, [event(1, "first"), event(2, "second")]);

    let fake = node.fake.clone();
    let publisher = std::thread::spawn(move || {
        wait_for("nobody subscribed", || fake.subscribers() > 1);
        fake.publish(&event(3, "live\nwith a line feed"));
    });
    let mut seen = Vec::new();
    let broken = client.lines("/v1/events", &mut |line| {
        seen.push(serde_json::from_str::<Event>(line).expect("an event"));
        if seen.len() == 3 {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    });
    assert!(broken.expect("read").is_none());
    assert_eq!(seen[2], event(3, "live\nwith a line feed"));
    publisher.join().expect("published");
}

#[test]
fn a_reader_that_closed_is_forgotten() {
    let node = Node::start();
    let mut stream = connect(&node);
    stream
        .write_all(b"GET /v1/events HTTP/1.1\r\n\r\n")
        .expect("open");
    stream.read_exact(&mut [0u8; 15]).expect("served");
    drop(stream);
    // Without a single event: the server looks by itself.
    std::thread::sleep(SECOND);
    assert_eq!(node.fake.publish(&event(3, "x")), 0);
}

#[test]
fn a_reader_that_stops_reading_is_dropped_and_blocks_nobody() {
    let node = Node::with(Limits {
        connections: 1,
        write: SECOND / 2,
        ..Limits::default()
    });
    let mut stalled = connect(&node);
    stalled
        .write_all(b"GET /v1/events HTTP/1.1\r\n\r\n")
        .expect("open");
    wait_for("not subscribed", || node.fake.subscribers() == 1);
    let big = event(3, &"x".repeat(64 * 1024));
    let mut slowest = Duration::ZERO;
    let end = Instant::now() + 10 * SECOND;
    loop {
        let started = Instant::now();
        let left = node.fake.publish(&big);
        slowest = slowest.max(started.elapsed());
        if left == 0 {
            break;
        }
        assert!(Instant::now() < end, "a stalled reader is kept for ever");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(slowest < SECOND / 4, "publishing took {slowest:?}");
    // Its place is given to somebody else although it never closed.
    wait_for("its place is not given back", || {
        status_of(&raw(&node, &get("/v1/status"))) == 200
    });
    drop(stalled);
}

#[test]
fn curl_understands_it() {
    let Ok(version) = std::process::Command::new("curl").arg("--version").output() else {
        eprintln!("skipped: there is no curl on this machine");
        return;
    };
    assert!(version.status.success());
    let node = Node::start();
    for (arguments, wanted) in [
        (&["http://localhost/v1/status"][..], "\"instance\":\"ab12\""),
        (&["http://x/v1/events?follow=0"], "\"text\":\"second\""),
        (
            &["-X", "POST", "http://x/v1/workloads/a%2Fb:1/evict"],
            "\"bytes\":1073741824",
        ),
        (
            &[
                "-d",
                "{}",
                "-w",
                "%{http_code}",
                "http://x/v1/workloads/busy/evict",
            ],
            "409",
        ),
        (&["-I", "http://x/metrics"], "200 OK"),
    ] {
        let output = std::process::Command::new("curl")
            .args(["-sS", "--max-time", "10", "--unix-socket"])
            .arg(node.api())
            .args(arguments)
            .output()
            .expect("curl runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        assert!(text.contains(wanted), "{arguments:?}: {text}");
    }
}
