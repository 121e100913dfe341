//! What a stranger's packets can do without any secret: neither fill the log nor keep others out.

mod support;

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use lite_llm_transport::{identity::Role, join::join, session::Hello};
use support::*;
use tracing::{Event, Level, Metadata, Subscriber, field, span};

/// Keeps the lines of the log that people see unless told otherwise.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }
    fn event(&self, event: &Event<'_>) {
        struct Text(String);
        impl field::Visit for Text {
            fn record_debug(&mut self, field: &field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Sends datagrams that look like the first of a connection until told to stop.
fn flood(to: SocketAddr, stop: Arc<AtomicBool>, sent: Arc<AtomicU64>) {
    let socket = UdpSocket::bind(loopback()).unwrap();
    let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
    while !stop.load(Relaxed) {
        let mut packet = vec![0; 1226];
        for byte in &mut packet {
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            *byte = chance as u8;
        }
        packet[0] = 0xc0 | (packet[0] & 15);
        packet[1..6].copy_from_slice(&[0, 0, 0, 1, 8]);
        packet[14] = 8;
        packet[23..26].copy_from_slice(&[0, 0x44, 0xb0]);
        let _ = socket.send_to(&packet, to);
        sent.fetch_add(1, Relaxed);
        // What comes back is not looked at, and a machine has other things to do.
        if sent.load(Relaxed).is_multiple_of(32) {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_packets_are_a_line_a_second_and_keep_nobody_out() {
    let lines = Lines::default();
    tracing::subscriber::set_global_default(lines.clone()).unwrap();
    let ca = authority();
    let head = coordinator(&ca);
    let address = head.local_addr().unwrap();
    let token = ca.join_token(Role::Client, "").unwrap();
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (stops, counts) = (stop.clone(), sent.clone());
    let flooding = thread::spawn(move || flood(address, stops, counts));
    let begun = Instant::now();
    let mut joined = 0;
    while begun.elapsed() < Duration::from_secs(4) {
        let name = format!("c{joined}");
        soon("join", join(address, &token, Role::Client, &name, &Hello::new(1))).await.unwrap();
        joined += 1;
    }
    stop.store(true, Relaxed);
    flooding.join().unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let said = lines.0.lock().unwrap().clone();
    let sent = sent.load(Relaxed);
    println!("{sent} packets, {joined} joined, {} lines, the last: {:?}", said.len(), said.last());
    assert!(sent > 2000 && joined > 3, "{sent} packets, {joined} joined");
    assert!((2..=8).contains(&said.len()), "{} lines in 5 s: {said:#?}", said.len());
    let counted = said.iter().any(|line| line.contains("refused a connection, and"));
    assert!(counted, "what is not said is counted: {said:#?}");
}
