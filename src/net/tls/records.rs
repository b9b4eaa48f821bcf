//! TLS 1.3 towards clients once the handshake is over: records, key updates and alerts.
//!
//! rustls still makes the keys; its machine, which keeps what only a handshake needs for as long as the client stays, is
//! not needed any more. For servers, and for TLS 1.2, it stays: they are few.
//!
//! Source: RFC 8446, sections 4.6.3, 5 and 6.

use std::io;

use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::{AlertDescription, ContentType, Error, HandshakeType};

use super::traffic_key::{HEADER, TrafficKey};
use super::{OVERHEAD_MAX, Opened, PLAINTEXT_MAX, RECORDS_PER_WRITE, broken, too_long};

/// The longest encrypted record, without its header; bytes.
const CIPHERTEXT_MAX: usize = PLAINTEXT_MAX + 256;

/// What of a `KeyUpdate` is the same in all of them: its type and its length. One byte follows.
///
/// Source: RFC 8446, section 4.6.3.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// Records in a row that hold no data, at most: a peer could keep us busy with them.
const IDLE_MAX: u8 = 32;

/// One connection's keys, each direction with its own.
pub(super) struct Records {
    /// Makes the next keys.
    kernel: KernelConnection<ServerConnectionData>,
    sealer: TrafficKey,
    opener: TrafficKey,
    /// Records that one key may seal.
    ///
    /// Source: RFC 8446, section 5.5.
    most: u64,
    /// Records since the last that held data.
    idle: u8,
    /// How much of a [`KEY_UPDATE`] the last records held that was not all of it: more of it has to come in the next, and
    /// nothing else. There is no other message to be kept a part of.
    begun: u8,
    /// The peer wants us to change our key. However often it says so until we write: once.
    update_due: bool,
    stage: Stage,
}

/// How far a connection is.
///
/// ```text
/// Open ──close_notify sent──▶ Ended ──a fault──▶ Failed
///   └────────────────a fault─────────────────────▲
/// ```
///
/// The end of what the peer says is its caller's to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Open,
    /// We have said our last, and still listen.
    Ended,
    /// Nothing is understood or said any more.
    Failed,
}

/// What a record held.
enum Held {
    Data(usize),
    Nothing,
    TheEnd,
}

/// Why a connection is over, and what the peer is told; nothing if it has said so itself.
struct Fault(Option<AlertDescription>, io::Error);

impl Fault {
    fn new(alert: AlertDescription, problem: &'static str) -> Self {
        Self(Some(alert), io::Error::new(io::ErrorKind::InvalidData, problem))
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let alert = match &error {
            Error::DecryptError => AlertDescription::BadRecordMac,
            Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
            Error::PeerMisbehaved(_) => AlertDescription::UnexpectedMessage,
            _ => AlertDescription::InternalError,
        };
        Self(Some(alert), broken(error))
    }
}

impl Records {
    /// Takes the keys of a connection whose handshake is complete, and all of it sent. Its configuration must have
    /// `enable_secret_extraction`.
    ///
    /// # Errors
    ///
    /// Anything that is not so, and versions but TLS 1.3.
    pub(super) fn take_over(machine: UnbufferedServerConnection) -> Result<Self, Error> {
        let (secrets, kernel) = machine.dangerous_into_kernel_connection()?;
        let suite = kernel.negotiated_cipher_suite().tls13().ok_or(Error::HandshakeNotComplete)?;
        let ((sealed, own), (opened, theirs)) = (secrets.tx, secrets.rx);
        Ok(Self {
            sealer: TrafficKey::new(own, sealed)?,
            opener: TrafficKey::new(theirs, opened)?,
            most: suite.common.confidentiality_limit,
            kernel,
            idle: 0,
            begun: 0,
            update_due: false,
            stage: Stage::Open,
        })
    }

    /// Decrypts every whole record of `input`, which begin at [`PLAINTEXT_MAX`]; their plaintext is at the front then. If it
    /// fails, `out` gets the alert that says so.
    pub(super) fn open(&mut self, input: &mut [u8], out: &mut Vec<u8>) -> io::Result<Opened> {
        if self.stage == Stage::Failed {
            return Err(over());
        }
        let mut opened = Opened { plain: 0, rest: PLAINTEXT_MAX, closed: false };
        loop {
            let (room, records) = input.split_at_mut_checked(opened.rest).ok_or_else(too_long)?;
            let room = room.get_mut(opened.plain..).unwrap_or_default();
            let held = match whole(records) {
                Ok(None) => return Ok(opened),
                Ok(Some(length)) => {
                    opened.rest += HEADER + length;
                    let record = records.get_mut(HEADER..HEADER + length).unwrap_or_default();
                    self.open_one(record, room)
                }
                Err(fault) => Err(fault),
            };
            match held {
                Ok(Held::Data(length)) => opened.plain += length,
                Ok(Held::Nothing) => {}
                Ok(Held::TheEnd) => {
                    opened.closed = true;
                    opened.rest = input.len();
                    return Ok(opened);
                }
                Err(Fault(alert, error)) => {
                    self.fail(alert, out);
                    return Err(error);
                }
            }
        }
    }

    /// The peer learns why, if there is a way to tell it.
    fn fail(&mut self, alert: Option<AlertDescription>, out: &mut Vec<u8>) {
        if let (Stage::Open, Some(alert)) = (self.stage, alert) {
            let mut record = [0; HEADER + OVERHEAD_MAX];
            let length = self.sealer.seal(ContentType::Alert, &[2, alert.into()], &mut record).unwrap_or(0);
            out.extend_from_slice(record.get(..length).unwrap_or_default());
        }
        self.stage = Stage::Failed;
    }

    /// Decrypts one record in place; its data goes to the front of `room`.
    fn open_one(&mut self, record: &mut [u8], room: &mut [u8]) -> Result<Held, Fault> {
        let (kind, length) = self.opener.open(record)?;
        let held = record.get(..length).unwrap_or_default();
        if kind == ContentType::ApplicationData && !held.is_empty() {
            if self.idle > 0 {
                self.not_interleaved()?;
                self.idle = 0;
            }
            let to = room.get_mut(..length).ok_or_else(|| Fault(None, too_long()))?;
            to.copy_from_slice(held);
            return Ok(Held::Data(length));
        }
        self.idle += 1;
        if self.idle > IDLE_MAX {
            return Err(Fault::new(AlertDescription::UnexpectedMessage, "TLS: too many records without data"));
        }
        if kind != ContentType::Handshake {
            self.not_interleaved()?;
        }
        match (kind, held) {
            (ContentType::ApplicationData, _) => Ok(Held::Nothing),
            (ContentType::Alert, &[level, alert]) => judge(level, AlertDescription::from(alert)),
            // RFC 8446, section 5.4; an empty one is no message at all.
            (ContentType::Alert, &[_, ..]) => {
                Err(Fault::new(AlertDescription::DecodeError, "TLS: an alert that is not two bytes"))
            }
            (ContentType::Handshake, &[_, ..]) => self.take_key_update(held),
            _ => Err(out_of_place()),
        }
    }

    /// A message of the handshake may be cut into several records, with none of another type between them.
    ///
    /// Source: RFC 8446, section 5.1.
    fn not_interleaved(&self) -> Result<(), Fault> {
        if self.begun == 0 { Ok(()) } else { Err(out_of_place()) }
    }

    /// Takes a `KeyUpdate`, or the next part of one. It ends its record: what follows has the next key.
    ///
    /// Source: RFC 8446, sections 4.6.3 and 5.1.
    #[cold]
    fn take_key_update(&mut self, held: &[u8]) -> Result<Held, Fault> {
        let want = KEY_UPDATE.get(usize::from(self.begun)..).unwrap_or_default();
        let (front, rest) = held.split_at_checked(want.len()).unwrap_or((held, &[]));
        if !want.starts_with(front) {
            return Err(out_of_place());
        }
        let wanted = match *rest {
            [] => {
                // At most the four.
                self.begun += u8::try_from(front.len()).unwrap_or_default();
                return Ok(Held::Nothing);
            }
            [wanted] => wanted,
            _ => return Err(out_of_place()),
        };
        self.begun = 0;
        self.update_due |= match wanted {
            0 => false,
            1 => true,
            _ => {
                let problem = "TLS: a key update that asks for neither nor";
                return Err(Fault::new(AlertDescription::IllegalParameter, problem));
            }
        };
        let (next, secrets) = self.kernel.update_rx_secret()?;
        self.opener = TrafficKey::new(secrets, next)?;
        Ok(Held::Nothing)
    }

    /// Encrypts as much of `parts` as [`RECORDS_PER_WRITE`] records hold. Returns the bytes taken and those made.
    pub(super) fn seal(&mut self, parts: [&[u8]; 2], out: &mut [u8]) -> io::Result<(usize, usize)> {
        if self.stage != Stage::Open {
            return Err(over());
        }
        let (mut taken, mut made) = (0, 0);
        let mut records = RECORDS_PER_WRITE;
        // There is always one number left for an alert.
        if self.update_due || self.sealer.next().saturating_add(RECORDS_PER_WRITE as u64) >= self.most {
            made += self.change_key(out)?;
        }
        for part in parts {
            for chunk in part.chunks(PLAINTEXT_MAX).take(records) {
                records -= 1;
                made += self.seal_one(ContentType::ApplicationData, chunk, out.get_mut(made..).unwrap_or_default())?;
                taken += chunk.len();
            }
            if records == 0 {
                break;
            }
        }
        Ok((taken, made))
    }

    /// Makes a `close_notify`. Returns its length; 0 if none can be said.
    pub(super) fn seal_end(&mut self, out: &mut [u8]) -> usize {
        if self.stage != Stage::Open {
            return 0;
        }
        let made = self.seal_one(ContentType::Alert, &[1, AlertDescription::CloseNotify.into()], out).unwrap_or(0);
        if self.stage == Stage::Open {
            self.stage = Stage::Ended;
        }
        made
    }

    /// Says that the next record has the next key, and takes that.
    fn change_key(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let made = self.seal_one(ContentType::Handshake, &[HandshakeType::KeyUpdate.into(), 0, 0, 1, 0], out)?;
        let renewed = self.kernel.update_tx_secret().and_then(|(next, secrets)| TrafficKey::new(secrets, next));
        self.sealer = renewed.map_err(|error| self.give_up(error))?;
        self.update_due = false;
        Ok(made)
    }

    fn seal_one(&mut self, kind: ContentType, payload: &[u8], out: &mut [u8]) -> io::Result<usize> {
        // Without this record the peer would understand none that follows.
        self.sealer.seal(kind, payload, out).map_err(|error| self.give_up(error))
    }

    fn give_up(&mut self, error: Error) -> io::Error {
        self.stage = Stage::Failed;
        broken(error)
    }
}

fn out_of_place() -> Fault {
    Fault::new(AlertDescription::UnexpectedMessage, "TLS: a message that has no place here")
}

fn over() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "TLS: the connection is over")
}

/// The length of the first record without its header; none if it is not all there.
fn whole(records: &[u8]) -> Result<Option<usize>, Fault> {
    let Some(&[kind, _, _, high, low]) = records.first_chunk::<HEADER>() else { return Ok(None) };
    if kind != u8::from(ContentType::ApplicationData) {
        return Err(Fault::new(AlertDescription::UnexpectedMessage, "TLS: a record that is not encrypted"));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > CIPHERTEXT_MAX {
        return Err(Fault::new(AlertDescription::RecordOverflow, "TLS: a record longer than its limit"));
    }
    Ok((records.len() >= HEADER + length).then_some(length))
}

/// What an alert of the peer's means.
fn judge(level: u8, alert: AlertDescription) -> Result<Held, Fault> {
    match (level, alert) {
        (1 | 2, AlertDescription::CloseNotify) => Ok(Held::TheEnd),
        (1, AlertDescription::UserCanceled) => Ok(Held::Nothing),
        (1 | 2, alert) => Err(Fault(None, broken(Error::AlertReceived(alert)))),
        _ => Err(Fault::new(AlertDescription::IllegalParameter, "TLS: an alert of an unknown level")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Arc;

    use rustls::crypto::CryptoProvider;
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use rustls::version::TLS13;
    use rustls::{CipherSuite, ClientConfig, ClientConnection, ServerConfig};

    use super::super::RECORD_MAX;
    use super::super::handshake::{Next, Shown, step};
    use super::super::verifier::OfServers;
    use super::*;

    /// A client whose TLS is rustls', and ours at the other end, after the handshake.
    fn pair(suite: CipherSuite) -> (ClientConnection, Records) {
        pair_logged(suite, Arc::default())
    }

    /// The same, and the client's secrets are told.
    fn pair_logged(suite: CipherSuite, told: Arc<Told>) -> (ClientConnection, Records) {
        let (client, records, ahead) = pair_with(suite, usize::MAX, told, |_| {});
        assert!(ahead.is_empty());
        (client, records)
    }

    /// The same with a client that does something as soon as it can: what comes of it is in one piece with its last message
    /// of the handshake. We read `piece` bytes at a time.
    fn pair_with(
        suite: CipherSuite,
        piece: usize,
        told: Arc<Told>,
        eager: impl Fn(&mut ClientConnection),
    ) -> (ClientConnection, Records, Vec<u8>) {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites.retain(|known| known.suite() == suite);
        let provider = Arc::new(provider);
        let mut client =
            ClientConnection::new(client_config(&provider, told), "localhost".try_into().unwrap()).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).unwrap();
        let mut config = builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.enable_secret_extraction = true;
        let mut machine = UnbufferedServerConnection::new(Arc::new(config)).unwrap();
        let (mut arriving, mut input, mut out) = (Vec::new(), Vec::new(), Vec::new());
        let mut shown = Shown::default();
        loop {
            while client.wants_write() {
                client.write_tls(&mut arriving).unwrap();
            }
            let done = loop {
                let (used, next) = step(&mut machine, shown.of(&mut input), &mut out);
                shown.discard(used, &mut input);
                match next.unwrap() {
                    Next::Again | Next::Write => {}
                    Next::Read if shown.more(&input) => {}
                    Next::Read if arriving.is_empty() => break false,
                    Next::Read => input.extend(arriving.drain(..piece.min(arriving.len()))),
                    Next::Done => break true,
                }
            };
            let was_handshaking = client.is_handshaking();
            hear(&mut client, &out).unwrap();
            out.clear();
            if was_handshaking && !client.is_handshaking() {
                eager(&mut client);
            }
            if done {
                // What is read later.
                input.append(&mut arriving);
                return (client, Records::take_over(machine).unwrap(), input);
            }
        }
    }

    fn client_config(provider: &Arc<CryptoProvider>, told: Arc<Told>) -> Arc<ClientConfig> {
        let judge = OfServers { roots: None, host: None, algorithms: provider.signature_verification_algorithms };
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13]).unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(judge));
        let mut config = builder.with_no_client_auth();
        config.enable_secret_extraction = true;
        config.key_log = told;
        Arc::new(config)
    }

    /// What the client understands of some bytes.
    fn hear(client: &mut ClientConnection, mut bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut heard = Vec::new();
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).unwrap();
            let state = client.process_new_packets()?;
            let mut plain = vec![0; state.plaintext_bytes_to_read()];
            client.reader().read_exact(&mut plain).unwrap();
            heard.extend(plain);
        }
        Ok(heard)
    }

    /// What we understand of some bytes, and what we answer.
    fn open(records: &mut Records, bytes: &[u8]) -> (io::Result<Opened>, Vec<u8>, Vec<u8>) {
        let mut input = vec![0; PLAINTEXT_MAX];
        input.extend_from_slice(bytes);
        let mut out = Vec::new();
        let opened = records.open(&mut input, &mut out);
        let plain = opened.as_ref().map_or(0, |opened| opened.plain);
        input.truncate(plain);
        (opened, input, out)
    }

    fn say(client: &mut ClientConnection, text: &[u8]) -> Vec<u8> {
        client.writer().write_all(text).unwrap();
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        bytes
    }

    fn seal(records: &mut Records, text: &[u8]) -> Vec<u8> {
        let mut out = vec![0; RECORDS_PER_WRITE * (PLAINTEXT_MAX + OVERHEAD_MAX)];
        let (taken, made) = records.seal([text, &[]], &mut out).unwrap();
        assert_eq!(taken, text.len());
        out.truncate(made);
        out
    }

    const SUITES: [CipherSuite; 3] = [
        CipherSuite::TLS13_AES_128_GCM_SHA256,
        CipherSuite::TLS13_AES_256_GCM_SHA384,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
    ];

    #[test]
    fn both_sides_understand_each_other_under_changing_keys() {
        for suite in SUITES {
            let (mut client, mut records) = pair(suite);
            for round in 0..10_u8 {
                let text = vec![round; 40_000];
                if round % 3 == 1 {
                    client.refresh_traffic_keys().unwrap();
                }
                let (opened, heard, out) = open(&mut records, &say(&mut client, &text));
                assert!(opened.is_ok_and(|opened| !opened.closed) && heard == text && out.is_empty(), "{suite:?}");
                assert_eq!(records.update_due, round % 3 == 1, "a change that was asked for waits for the next write");
                assert_eq!(hear(&mut client, &seal(&mut records, &text)).unwrap(), text, "{suite:?}");
            }
            client.send_close_notify();
            let (opened, _, _) = open(&mut records, &say(&mut client, b""));
            assert!(opened.unwrap().closed);
        }
    }

    #[test]
    fn no_key_seals_more_than_it_may() {
        let (mut client, mut records) = pair(SUITES[0]);
        records.most = 10;
        for round in 0..100_u8 {
            let text = vec![round; 4 * PLAINTEXT_MAX];
            assert_eq!(hear(&mut client, &seal(&mut records, &text)).unwrap(), text);
            assert!(records.sealer.next() < 10, "{}", records.sealer.next());
        }
    }

    #[test]
    fn records_that_come_in_pieces_are_kept() {
        let (mut client, mut records) = pair(SUITES[0]);
        let bytes = say(&mut client, &vec![7; 20_000]);
        assert!(bytes.len() < 2 * RECORD_MAX);
        let (mut kept, mut heard) = (Vec::new(), Vec::new());
        for piece in bytes.chunks(777) {
            kept.extend_from_slice(piece);
            let (opened, plain, _) = open(&mut records, &kept);
            kept.drain(..opened.unwrap().rest - PLAINTEXT_MAX);
            heard.extend(plain);
        }
        assert_eq!((heard, kept.len()), (vec![7; 20_000], 0));
    }

    /// A client that says what it likes, with the right keys.
    struct Liar {
        sealer: TrafficKey,
        opener: TrafficKey,
    }

    impl Liar {
        fn take_over(client: ClientConnection) -> Self {
            let secrets = client.dangerous_extract_secrets().unwrap();
            let key = |(next, secrets)| TrafficKey::new(secrets, next).unwrap();
            Self { sealer: key(secrets.tx), opener: key(secrets.rx) }
        }

        fn say(&mut self, kind: ContentType, payload: &[u8]) -> Vec<u8> {
            let mut out = vec![0; payload.len() + 64];
            let length = self.sealer.seal(kind, payload, &mut out).unwrap();
            out.truncate(length);
            out
        }

        /// The alert that some bytes are, if they are anything.
        fn hear(&mut self, bytes: &[u8]) -> Option<AlertDescription> {
            let mut record = bytes.get(HEADER..)?.to_vec();
            let opened = self.opener.open(&mut record).unwrap();
            assert_eq!((opened, record[0]), ((ContentType::Alert, 2), 2), "a fatal alert");
            Some(AlertDescription::from(record[1]))
        }
    }

    #[test]
    fn what_has_no_place_ends_the_connection() {
        use AlertDescription::{DecodeError, IllegalParameter, UnexpectedMessage};
        use ContentType::{Alert, ApplicationData, ChangeCipherSpec, Handshake};
        #[rustfmt::skip]
        let table: [(&str, ContentType, &[u8], usize, Result<bool, Option<AlertDescription>>); 25] = [
            // How often; whether that is the end of the stream, or an error, and what the peer is told.
            ("the end",                  Alert,            &[1, 0],                         1,  Ok(true)),
            ("the end, fatally",         Alert,            &[2, 0],                         1,  Ok(true)),
            ("the user's wish",          Alert,            &[1, 90],                        32, Ok(false)),
            ("too many wishes",          Alert,            &[1, 90],                        33, Err(Some(UnexpectedMessage))),
            ("a failure",                Alert,            &[2, 40],                        1,  Err(None)),
            ("a warning",                Alert,            &[1, 100],                       1,  Err(None)),
            ("an unknown alert",         Alert,            &[1, 255],                       1,  Err(None)),
            ("an unknown level",         Alert,            &[3, 0],                         1,  Err(Some(IllegalParameter))),
            ("no alert",                 Alert,            &[],                             1,  Err(Some(UnexpectedMessage))),
            ("half an alert",            Alert,            &[1],                            1,  Err(Some(DecodeError))),
            ("two alerts",               Alert,            &[1, 90, 1, 0],                  1,  Err(Some(DecodeError))),
            ("nothing",                  ApplicationData,  &[],                             32, Ok(false)),
            ("nothing too often",        ApplicationData,  &[],                             33, Err(Some(UnexpectedMessage))),
            ("no handshake message",     Handshake,        &[],                             1,  Err(Some(UnexpectedMessage))),
            ("a key update and more",    Handshake,        &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0], 1, Err(Some(UnexpectedMessage))),
            ("a key update of no kind",  Handshake,        &[24, 0, 0, 1, 2],               1,  Err(Some(IllegalParameter))),
            ("half a key update",        Handshake,        &[24, 0, 0],                     1,  Ok(false)),
            ("the same half again",      Handshake,        &[24, 0, 0],                     2,  Err(Some(UnexpectedMessage))),
            ("an empty key update",      Handshake,        &[24, 0, 0, 0],                  1,  Err(Some(UnexpectedMessage))),
            ("a hello",                  Handshake,        &[1, 0, 0, 0],                   1,  Err(Some(UnexpectedMessage))),
            ("a ticket",                 Handshake,        &[4, 0, 0, 1, 0],                1,  Err(Some(UnexpectedMessage))),
            ("a certificate",            Handshake,        &[11, 0, 0, 4, 0, 0, 0, 0],      1,  Err(Some(UnexpectedMessage))),
            ("a second end",             Handshake,        &[20, 0, 0, 0],                  1,  Err(Some(UnexpectedMessage))),
            ("a change of ciphers",      ChangeCipherSpec, &[1],                            1,  Err(Some(UnexpectedMessage))),
            ("an unknown kind",          ContentType::Unknown(99), &[1],                    1,  Err(Some(UnexpectedMessage))),
        ];
        for (case, kind, payload, times, want) in table {
            let (client, mut records) = pair(SUITES[1]);
            let mut liar = Liar::take_over(client);
            let bytes: Vec<u8> = (0..times).flat_map(|_| liar.say(kind, payload)).collect();
            let (opened, _, out) = open(&mut records, &bytes);
            let got = opened.map(|opened| opened.closed).map_err(|_| liar.hear(&out));
            assert_eq!(got, want, "{case}");
        }
    }

    /// The secrets that a client's key log tells.
    #[derive(Debug, Default)]
    struct Told(std::sync::Mutex<Vec<(String, Vec<u8>)>>);

    impl rustls::KeyLog for Told {
        fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
            self.0.lock().unwrap().push((label.to_owned(), secret.to_vec()));
        }
    }

    /// A second hand on what a client writes: its first key of this direction, behind `next` records.
    fn hand(told: &Told, next: u64) -> TrafficKey {
        use aws_lc_rs::hmac;
        use rustls::crypto::cipher::Iv;

        let told = told.0.lock().unwrap();
        let (_, secret) = told.iter().find(|(label, _)| label == "CLIENT_TRAFFIC_SECRET_0").unwrap();
        // RFC 8446, section 7.1: HKDF-Expand-Label, of no more than one block.
        let expand = |label: &str, length: u8| {
            let label = format!("tls13 {label}");
            let info = [&[0, length, u8::try_from(label.len()).unwrap()], label.as_bytes(), &[0, 1]].concat();
            hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), &info)
        };
        let (key, iv) = (expand("key", 16), expand("iv", 12));
        let iv: [u8; 12] = iv.as_ref()[..12].try_into().unwrap();
        TrafficKey::of_aes_128(&key.as_ref()[..16], Iv::from(iv), next)
    }

    #[test]
    fn a_key_update_may_be_cut_into_several_records_with_nothing_between_them() {
        use AlertDescription::{IllegalParameter, UnexpectedMessage};
        use ContentType::{Alert, ApplicationData, Handshake};
        const WHOLE: [u8; 5] = [24, 0, 0, 1, 1];
        // Every way to cut it: a bit for each place between two bytes.
        for cuts in 0..16_usize {
            let told = Arc::new(Told::default());
            let (mut client, mut records) = pair_logged(SUITES[0], told.clone());
            let first = say(&mut client, b"first");
            let mut hand = hand(&told, 1);
            client.refresh_traffic_keys().unwrap();
            // Its own is not sent; what follows it has the next key.
            let own = say(&mut client, b"second");
            let length = HEADER + usize::from(u16::from_be_bytes([own[3], own[4]]));
            let mut bytes = first;
            let mut fragment = Vec::new();
            for (at, byte) in WHOLE.into_iter().enumerate() {
                fragment.push(byte);
                if at == 4 || cuts & 1 << at != 0 {
                    let mut record = [0; 64];
                    let made = hand.seal(Handshake, &fragment, &mut record).unwrap();
                    bytes.extend_from_slice(&record[..made]);
                    fragment.clear();
                }
            }
            bytes.extend_from_slice(&own[length..]);
            // At once, and byte by byte.
            let (mut kept, mut heard) = (Vec::new(), Vec::new());
            for piece in bytes.chunks(if cuts % 2 == 0 { bytes.len() } else { 1 }) {
                kept.extend_from_slice(piece);
                let (opened, plain, out) = open(&mut records, &kept);
                kept.drain(..opened.unwrap().rest - PLAINTEXT_MAX);
                assert!(out.is_empty());
                heard.extend(plain);
            }
            assert_eq!((heard, records.begun), (b"firstsecond".to_vec(), 0), "{cuts:04b}");
            assert!(records.update_due);
            assert_eq!(hear(&mut client, &seal(&mut records, b"answer")).unwrap(), b"answer", "{cuts:04b}");
        }
        #[rustfmt::skip]
        let table: [(&str, &[(ContentType, &[u8])], AlertDescription); 8] = [
            ("data between",        &[(Handshake, &[24, 0]), (ApplicationData, b"x")],                  UnexpectedMessage),
            ("no data between",     &[(Handshake, &[24, 0]), (ApplicationData, b"")],                   UnexpectedMessage),
            ("an alert between",    &[(Handshake, &[24, 0, 0, 1]), (Alert, &[1, 90])],                  UnexpectedMessage),
            ("the end between",     &[(Handshake, &[24]), (Alert, &[1, 0])],                            UnexpectedMessage),
            ("an empty part",       &[(Handshake, &[24]), (Handshake, b"")],                            UnexpectedMessage),
            ("another message",     &[(Handshake, &[24, 0]), (Handshake, &[1, 1, 0])],                  UnexpectedMessage),
            ("more behind it",      &[(Handshake, &[24, 0, 0]), (Handshake, &[1, 0, 24])],              UnexpectedMessage),
            ("of no kind",          &[(Handshake, &[24, 0, 0, 1]), (Handshake, &[7])],                  IllegalParameter),
        ];
        for (case, parts, want) in table {
            let (client, mut records) = pair(SUITES[1]);
            let mut liar = Liar::take_over(client);
            let bytes: Vec<u8> = parts.iter().flat_map(|(kind, payload)| liar.say(*kind, payload)).collect();
            let (opened, heard, out) = open(&mut records, &bytes);
            assert!(opened.is_err() && heard.is_empty(), "{case}");
            assert_eq!(liar.hear(&out), Some(want), "{case}");
        }
    }

    #[test]
    fn records_without_data_are_counted_from_the_last_with_data() {
        let (client, mut records) = pair(SUITES[0]);
        let mut liar = Liar::take_over(client);
        for _ in 0..3 {
            let mut bytes: Vec<u8> = (0..IDLE_MAX).flat_map(|_| liar.say(ContentType::ApplicationData, &[])).collect();
            bytes.extend(liar.say(ContentType::ApplicationData, b"x"));
            let (opened, heard, _) = open(&mut records, &bytes);
            assert!(opened.is_ok() && heard == b"x");
        }
    }

    #[test]
    fn what_stands_behind_the_end_is_not_heard() {
        let (client, mut records) = pair(SUITES[0]);
        let mut liar = Liar::take_over(client);
        let mut bytes = liar.say(ContentType::ApplicationData, b"last");
        bytes.extend(liar.say(ContentType::Alert, &[1, 0]));
        bytes.extend(liar.say(ContentType::ApplicationData, b"and more"));
        let (opened, heard, out) = open(&mut records, &bytes);
        assert_eq!(opened.unwrap(), Opened { plain: 4, rest: PLAINTEXT_MAX + bytes.len(), closed: true });
        assert!(heard == b"last" && out.is_empty());
        // We may still speak.
        assert!(!seal(&mut records, b"answer").is_empty());
    }

    #[test]
    fn a_record_that_is_not_the_peers_ends_the_connection_and_it_is_told() {
        type Spoil = fn(&mut Vec<u8>);
        #[rustfmt::skip]
        let table: [(&str, Spoil, AlertDescription); 9] = [
            ("a bit of data",    |bytes| bytes[9] ^= 1,                         AlertDescription::BadRecordMac),
            ("the last bit",     |bytes| *bytes.last_mut().unwrap() ^= 1,       AlertDescription::BadRecordMac),
            ("played twice",     |bytes| bytes.extend_from_within(..),          AlertDescription::BadRecordMac),
            ("too short",        |bytes| *bytes = vec![23, 3, 3, 0, 2, 1, 1],   AlertDescription::BadRecordMac),
            ("empty",            |bytes| *bytes = vec![23, 3, 3, 0, 0],         AlertDescription::BadRecordMac),
            ("too long",         |bytes| bytes[3] = 0x42,                       AlertDescription::RecordOverflow),
            ("too long by one",  |bytes| bytes[3..5].copy_from_slice(&[0x41, 1]), AlertDescription::RecordOverflow),
            ("an alert in clear", |bytes| *bytes = vec![21, 3, 3, 0, 2, 1, 0],  AlertDescription::UnexpectedMessage),
            ("a change of ciphers in clear", |bytes| *bytes = vec![20, 3, 3, 0, 1, 1], AlertDescription::UnexpectedMessage),
        ];
        for (case, spoil, want) in table {
            let (mut client, mut records) = pair(SUITES[0]);
            let mut bytes = say(&mut client, b"SELECT 1");
            spoil(&mut bytes);
            let (opened, _, out) = open(&mut records, &bytes);
            assert!(opened.is_err(), "{case}");
            assert_eq!(hear(&mut client, &out), Err(Error::AlertReceived(want)), "{case}");
        }
    }

    #[test]
    fn what_comes_right_behind_the_handshake_is_neither_lost_nor_answered_by_a_machine_that_is_gone() {
        for (suite, piece) in SUITES.into_iter().flat_map(|suite| [usize::MAX, 1, 7, 100].map(|piece| (suite, piece))) {
            let (mut client, mut records, ahead) = pair_with(suite, piece, Arc::default(), |client| {
                client.writer().write_all(b"first").unwrap();
                client.refresh_traffic_keys().unwrap();
                client.writer().write_all(b"second").unwrap();
            });
            let (opened, heard, out) = open(&mut records, &ahead);
            assert_eq!(opened.unwrap().rest, PLAINTEXT_MAX + ahead.len(), "the machine saw nothing of it");
            assert!(heard == b"firstsecond" && out.is_empty(), "{suite:?}, {piece}");
            assert!(records.update_due);
            assert_eq!(hear(&mut client, &seal(&mut records, b"answer")).unwrap(), b"answer", "{suite:?}, {piece}");
        }
    }

    #[test]
    fn nothing_is_understood_or_said_after_a_failure_and_nothing_said_after_the_end() {
        let (mut client, mut records) = pair(SUITES[0]);
        let (mut spoilt, good) = (say(&mut client, b"one"), say(&mut client, b"two"));
        let whole = spoilt.clone();
        spoilt[9] ^= 1;
        assert!(open(&mut records, &spoilt).0.is_err());
        for bytes in [&whole, &good] {
            let (opened, heard, out) = open(&mut records, bytes);
            assert!(opened.is_err() && heard.is_empty() && out.is_empty());
        }
        let mut out = [0; 128];
        assert!(records.seal([b"x", b""], &mut out).is_err());
        assert_eq!(records.seal_end(&mut out), 0);

        let (mut client, mut records) = pair(SUITES[0]);
        let length = records.seal_end(&mut out);
        assert!(length > 0 && hear(&mut client, &out[..length]).unwrap().is_empty());
        assert_eq!(records.seal_end(&mut out), 0);
        assert!(records.seal([b"x", b""], &mut out).is_err());
        assert_eq!(open(&mut records, &say(&mut client, b"more")).1, b"more", "the peer may still talk");
        let mut spoilt = say(&mut client, b"yet more");
        spoilt[9] ^= 1;
        let (opened, _, out) = open(&mut records, &spoilt);
        assert!(opened.is_err() && out.is_empty(), "behind our last there is not even an alert");
    }

    #[test]
    fn what_could_not_be_written_down_is_the_end() {
        for due in [false, true] {
            let (_, mut records) = pair(SUITES[0]);
            records.update_due = due;
            let mut out = [0; 128];
            assert!(records.seal([b"SELECT 1", b""], &mut out[..20]).is_err());
            assert_eq!(records.stage, Stage::Failed);
            assert!(records.seal([b"SELECT 1", b""], &mut out).is_err());
            assert_eq!(records.seal_end(&mut out), 0);
        }
    }

    #[test]
    fn records_are_opened_as_far_as_they_are_whole_and_without_room_for_more_than_they_hold() {
        let (mut client, mut records) = pair(SUITES[0]);
        let texts: Vec<u8> = (0..=255).cycle().take(3 * PLAINTEXT_MAX).collect();
        let bytes = say(&mut client, &texts);
        let (opened, heard, _) = open(&mut records, &bytes[..bytes.len() - 1]);
        let opened = opened.unwrap();
        assert_eq!(heard, texts[..2 * PLAINTEXT_MAX]);
        let (_, rest, _) = open(&mut records, &bytes[opened.rest - PLAINTEXT_MAX..]);
        assert_eq!(rest, texts[2 * PLAINTEXT_MAX..]);
        assert_eq!(whole(&[23, 3, 3, 0x41, 0]).map_err(|fault| fault.0), Ok(None), "as long as may be");
    }

    #[test]
    fn a_peer_that_only_asks_for_new_keys_gets_one_answer_and_no_more_than_so_many_turns() {
        let (mut client, mut records) = pair(SUITES[0]);
        for _ in 0..IDLE_MAX {
            client.refresh_traffic_keys().unwrap();
            let (opened, _, out) = open(&mut records, &say(&mut client, b""));
            assert!(opened.is_ok() && out.is_empty());
        }
        let made = seal(&mut records, b"answer");
        assert!(made.len() < 2 * OVERHEAD_MAX, "one key update, one answer: {}", made.len());
        assert_eq!(hear(&mut client, &made).unwrap(), b"answer");
        client.refresh_traffic_keys().unwrap();
        assert!(open(&mut records, &say(&mut client, b"")).0.is_err());
    }
}
