//! Traffic keys that are renewed while a connection is in use (TLS 1.3), on both sides.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use aws_lc_rs::{aead, hmac};
use pgweir_harness::wait_until;
use pgweir_harness::wire::build;
use rustls::KeyLog;
use rustls::version::TLS13;

use super::client::{TlsClient, config, granted};
use super::clients::Front;
use super::pki::Authority;
use super::{TlsPrimary, psql};
use crate::binding::between::{Between, Meddling};
use crate::support::{Place, SOON, start_pgweir};

#[test]
fn a_client_may_renew_its_keys_and_ours_as_often_as_it_likes() {
    let front = Front::start("require", &[]);
    let mut client = TlsClient::on(granted(front.pgweir.addr()), &config(&[], &[&TLS13])).unwrap();
    client.log_in(&front.place.name);
    for round in 0..100 {
        // More than once without a word in between, too: that is answered once.
        for _ in 0..=round % 3 {
            client.renew_keys();
        }
        let text = "x".repeat(1 + 397 * round);
        assert_eq!(client.value(&format!("SELECT '{text}'")), text, "{round}");
    }
    // In the middle of what the server says.
    client.send(&build::query("SELECT repeat('y', 10000) FROM generate_series(1, 1000)"));
    let mut rows = 0;
    while let Some((tag, body)) = client.message() {
        match tag {
            b'D' => assert_eq!(body.len(), 2 + 4 + 10_000),
            b'Z' => break,
            _ => continue,
        }
        rows += 1;
        if rows % 100 == 0 {
            client.renew_keys();
            client.send(b"");
        }
    }
    assert_eq!(rows, 1000);
    assert_eq!(client.value("SELECT 7"), "7");
}

/// The traffic secret that a client's key log tells.
#[derive(Debug, Default)]
struct Told(Mutex<Vec<u8>>);

impl KeyLog for Told {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if label == "CLIENT_TRAFFIC_SECRET_0" {
            *self.0.lock().unwrap() = secret.to_vec();
        }
    }
}

/// Writes a client's records in its place: what no library would write.
struct Hand {
    /// With AES-256-GCM and SHA-384.
    secret: Vec<u8>,
    /// The number of the next record.
    next: u64,
}

impl Hand {
    /// RFC 8446, section 7.1: HKDF-Expand-Label, of no more than one block.
    fn expand(&self, label: &str, length: u8) -> Vec<u8> {
        let label = format!("tls13 {label}");
        let info = [&[0, length, u8::try_from(label.len()).unwrap()], label.as_bytes(), &[0, 1]].concat();
        let key = hmac::Key::new(hmac::HMAC_SHA384, &self.secret);
        hmac::sign(&key, &info).as_ref()[..usize::from(length)].to_vec()
    }

    fn record(&mut self, kind: u8, payload: &[u8]) -> Vec<u8> {
        let key = aead::UnboundKey::new(&aead::AES_256_GCM, &self.expand("key", 32)).unwrap();
        let mut nonce: [u8; 12] = self.expand("iv", 12).try_into().unwrap();
        for (byte, number) in nonce[4..].iter_mut().zip(self.next.to_be_bytes()) {
            *byte ^= number;
        }
        self.next += 1;
        let mut sealed = [payload, &[kind]].concat();
        let length = u16::try_from(sealed.len() + 16).unwrap().to_be_bytes();
        let header = [23, 3, 3, length[0], length[1]];
        let nonce = aead::Nonce::assume_unique_for_key(nonce);
        aead::LessSafeKey::new(key).seal_in_place_append_tag(nonce, aead::Aad::from(header), &mut sealed).unwrap();
        [&header[..], &sealed].concat()
    }

    /// The next key.
    fn renew(&mut self) {
        (self.secret, self.next) = (self.expand("traffic upd", 48), 0);
    }
}

#[test]
fn a_key_update_that_is_cut_into_several_records_is_one_and_nothing_may_stand_between_them() {
    const HANDSHAKE: u8 = 22;
    const DATA: u8 = 23;
    let front = Front::start("require", &[]);
    let told = Arc::new(Told::default());
    let mut config = (*config(&[], &[&TLS13])).clone();
    config.key_log = told.clone();
    let mut client = TlsClient::on(granted(front.pgweir.addr()), &Arc::new(config)).unwrap();
    client.log_in(&front.place.name);
    let secret = told.0.lock().unwrap().clone();
    assert_eq!(secret.len(), 48, "the first choice of both is AES-256");
    // The start-up message was a record.
    let mut hand = Hand { secret, next: 1 };
    let update = [24, 0, 0, 1, 1];
    for lengths in [&[5][..], &[1, 1, 1, 1, 1], &[4, 1], &[1, 4], &[2, 3]] {
        let mut rest = &update[..];
        let parts = lengths.iter().map(|length| rest.split_off(..*length).unwrap());
        let bytes: Vec<u8> = parts.flat_map(|part| hand.record(HANDSHAKE, part)).collect();
        client.renew_keys_by(&bytes);
        hand.renew();
        assert_eq!(client.value("SELECT 7"), "7", "{lengths:?}");
        hand.next += 1;
    }
    let query = build::query("SELECT 8");
    client.send_raw(&[hand.record(DATA, &query), hand.record(HANDSHAKE, &update[..2])].concat());
    assert_eq!(client.until(b'Z').len(), 4);
    client.send_raw(&hand.record(DATA, &query));
    assert!(client.message().is_none(), "something stands between the parts");
    assert!(front.pgweir.is_running());
}

/// `openssl s_client`, which renews keys when it reads a line with `k`, and asks for ours with `K`.
struct Openssl {
    child: Child,
    input: ChildStdin,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Openssl {
    fn start(port: u16) -> Self {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-starttls", "postgres", "-tls1_3", "-msg", "-connect"]);
        command.arg(format!("127.0.0.1:{port}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let heard = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&heard);
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut chunk) {
                all.lock().unwrap().extend_from_slice(&chunk[..read]);
            }
        });
        Self { child, input, heard }
    }

    /// How often this was printed so far.
    fn count(&self, text: &[u8]) -> usize {
        self.heard.lock().unwrap().windows(text.len()).filter(|window| *window == text).count()
    }

    fn say(&mut self, bytes: &[u8]) {
        self.input.write_all(bytes).unwrap();
        self.input.flush().unwrap();
    }

    /// A query by messages none of which begins with a letter that it takes for a command.
    fn ask(&mut self, text: &str) {
        let sql = format!("SELECT reverse('{}')", text.chars().rev().collect::<String>());
        let parts = [build::parse("", &sql, &[]), build::bind("", "", &[]), build::execute("", 0), build::sync()];
        self.say(&parts.concat());
        wait_until(SOON, || self.count(text.as_bytes()) == 1);
    }
}

impl Drop for Openssl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn openssl_renews_its_keys_and_gets_new_ones_from_us_when_it_asks_for_them() {
    let front = Front::start("require", &[]);
    let mut openssl = Openssl::start(front.pgweir.port());
    wait_until(SOON, || openssl.count(b"Verification") > 0 || openssl.count(b"Verify return code") > 0);
    let name = &front.place.name;
    openssl.say(&build::startup(&[("user", name), ("database", name)]));
    wait_until(SOON, || openssl.count(b"Z\0\0\0\x05I") == 1);
    openssl.ask("before");
    let (theirs, ours) =
        (b">>> TLS 1.3, Handshake [length 0005], KeyUpdate", b"<<< TLS 1.3, Handshake [length 0005], KeyUpdate");
    for (round, (command, updates)) in [("k", 0), ("K", 1), ("K", 2), ("k", 2), ("K", 3)].into_iter().enumerate() {
        openssl.say(format!("{command}\n").as_bytes());
        wait_until(SOON, || openssl.count(theirs) == round + 1);
        openssl.ask(&format!("round{round}"));
        assert_eq!(openssl.count(ours), updates, "round {round}");
    }
}

#[test]
fn a_server_may_renew_its_keys_and_ours_with_every_message() {
    let tls = TlsPrimary::take();
    let identity = Authority::root("the root").issue(|_| {});
    tls.show(&identity);
    let between = Between::start(tls.0.addr(), &identity, Meddling::RenewsKeys);
    let place = Place::on(&tls.0);
    let port = between.address.port().to_string();
    let pgweir = start_pgweir(place.toml(&[
        ("databases.PLACE.port", &port),
        ("databases.PLACE.sslmode", "require"),
        ("default_pool_size", "1"),
    ]));
    let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
    let sql = "SELECT sum(length(repeat('x', 1000 + g))) FROM generate_series(1, 10) g";
    let pid = psql(&tls.0, &words, "SELECT pg_backend_pid()").unwrap();
    for _ in 0..10 {
        assert_eq!(psql(&tls.0, &words, sql), Ok("10055".to_owned()));
    }
    let text = "x".repeat(100_000);
    assert_eq!(psql(&tls.0, &words, &format!("SELECT '{text}'")), Ok(text));
    assert_eq!(psql(&tls.0, &words, "SELECT pg_backend_pid()"), Ok(pid), "all on one server connection");
}
