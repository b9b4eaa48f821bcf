//! A traffic key of TLS 1.3, and the number of the next record under it.
//!
//! The ciphers are AWS-LC's. rustls' own encrypters cannot be taken on when the handshake is over: those of AES-GCM insist on
//! having sealed each record from number 0 on, and the session's ticket is sent before. Making number 0 anew to satisfy them
//! would be a nonce used twice.
//!
//! Source: RFC 8446, sections 5.2 to 5.4.

use aws_lc_rs::aead::{self, Aad, LessSafeKey, UnboundKey};
use rustls::crypto::cipher::{Iv, Nonce, make_tls13_aad};
use rustls::{ConnectionTrafficSecrets, ContentType, Error, PeerMisbehaved};

use super::PLAINTEXT_MAX;

/// The front of a record: type, version, length; bytes.
pub(super) const HEADER: usize = 5;

/// What authenticates a record; bytes, the same of all ciphers of TLS 1.3.
const TAG: usize = 16;

/// A key for one direction. It is overwritten when it is dropped: AWS-LC does so with all memory that it frees.
pub(super) struct TrafficKey {
    key: LessSafeKey,
    iv: Iv,
    /// Only ever counted up, so that no nonce comes twice.
    next: u64,
}

impl TrafficKey {
    /// A key that has seen `next` records.
    ///
    /// # Errors
    ///
    /// Secrets of a cipher that TLS 1.3 does not have.
    pub(super) fn new(secrets: ConnectionTrafficSecrets, next: u64) -> Result<Self, Error> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher without traffic keys".into())),
        };
        Self::with(algorithm, key.as_ref(), iv, next)
    }

    fn with(algorithm: &'static aead::Algorithm, key: &[u8], iv: Iv, next: u64) -> Result<Self, Error> {
        let key = UnboundKey::new(algorithm, key).map_err(|_| Error::EncryptError)?;
        Ok(Self { key: LessSafeKey::new(key), iv, next })
    }

    /// The number of the next record: how many there were under this key.
    pub(super) const fn next(&self) -> u64 {
        self.next
    }

    /// Writes a record to the front of `out`. Returns its length.
    ///
    /// # Errors
    ///
    /// More than one record holds, no room, or no number left; nothing of what `out` holds then may be sent. The number is
    /// used up all the same.
    pub(super) fn seal(&mut self, kind: ContentType, payload: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let nonce = self.nonce()?;
        self.next += 1;
        let length = payload.len() + 1 + TAG;
        let record = out.get_mut(..HEADER + length).filter(|_| payload.len() <= PLAINTEXT_MAX);
        let (header, sealed) =
            record.and_then(|record| record.split_at_mut_checked(HEADER)).ok_or(Error::EncryptError)?;
        let (ciphertext, rest) = sealed.split_at_mut_checked(payload.len()).ok_or(Error::EncryptError)?;
        // What is authenticated with the ciphertext is the record's header.
        let authentic = make_tls13_aad(length);
        header.copy_from_slice(&authentic);
        self.key
            .seal_out_of_place_scatter(nonce, Aad::from(authentic), payload, ciphertext, &[kind.into()], rest)
            .map_err(|_| Error::EncryptError)?;
        Ok(HEADER + length)
    }

    /// Decrypts a record without its header in place. Returns its type, and how much of the front is what it held.
    ///
    /// # Errors
    ///
    /// It is not the peer's next one, longer than it may be, or without a type. Nothing of `record` may be believed then.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, usize), Error> {
        let nonce = self.nonce()?;
        let authentic = Aad::from(make_tls13_aad(record.len()));
        let inner = self.key.open_in_place(nonce, authentic, record).map_err(|_| Error::DecryptError)?;
        self.next += 1;
        if inner.len() > PLAINTEXT_MAX + 1 {
            return Err(Error::PeerSentOversizedRecord);
        }
        // The type stands behind the content, and nothing but zeros behind it.
        let end = inner.iter().rposition(|byte| *byte != 0);
        let kind = end.and_then(|end| Some((ContentType::from(*inner.get(end)?), end)));
        kind.ok_or(Error::PeerMisbehaved(PeerMisbehaved::IllegalTlsInnerPlaintext))
    }

    fn nonce(&self) -> Result<aead::Nonce, Error> {
        if self.next == u64::MAX {
            return Err(Error::EncryptError);
        }
        Ok(aead::Nonce::assume_unique_for_key(Nonce::new(&self.iv, self.next).0))
    }
}

#[cfg(test)]
impl TrafficKey {
    /// A key of AES-128, for tests that write records of their own.
    pub(super) fn of_aes_128(key: &[u8], iv: Iv, next: u64) -> Self {
        let key = UnboundKey::new(&aead::AES_128_GCM, key).map(LessSafeKey::new);
        #[allow(clippy::unwrap_used, reason = "a test's")]
        let key = key.unwrap();
        Self { key, iv, next }
    }
}

#[cfg(test)]
mod tests {
    use rustls::crypto::cipher::AeadKey;

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<_> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    /// What one side uses to seal, and the other to open.
    fn keys(next: u64) -> [TrafficKey; 2] {
        [(); 2].map(|()| {
            let secrets = ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([7; 32]), iv: Iv::from([9; 12]) };
            TrafficKey::new(secrets, next).unwrap()
        })
    }

    /// A record of any inner plaintext whatever.
    fn raw(number: u64, inner: &[u8]) -> Vec<u8> {
        let key = LessSafeKey::new(UnboundKey::new(&aead::AES_256_GCM, &[7; 32]).unwrap());
        let nonce = aead::Nonce::assume_unique_for_key(Nonce::new(&Iv::from([9; 12]), number).0);
        let mut record = inner.to_vec();
        let tag = key.seal_in_place_separate_tag(nonce, Aad::from(make_tls13_aad(inner.len() + TAG)), &mut record);
        record.extend_from_slice(tag.unwrap().as_ref());
        record
    }

    #[test]
    fn records_are_those_of_the_rfc_byte_by_byte() {
        // RFC 8448, section 3: what the client sends last, two records with numbers 0 and 1.
        let key = bytes("17 42 2d da 59 6e d5 d9 ac d8 90 e3 c6 3f 50 51");
        let iv: [u8; 12] = bytes("5b 78 92 3d ee 08 57 90 33 e5 23 d9").try_into().unwrap();
        let key = || TrafficKey::with(&aead::AES_128_GCM, &key, Iv::from(iv), 0).unwrap();
        let data: Vec<u8> = (0..50).collect();
        #[rustfmt::skip]
        let want = [
            (ContentType::ApplicationData, data.as_slice(), bytes(
                "17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b 98 19 \
                 a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 \
                 15 e4")),
            (ContentType::Alert, &[1, 0], bytes(
                "17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3")),
        ];
        let (mut sealer, mut opener) = (key(), key());
        for (kind, payload, record) in want {
            let mut out = [0; 128];
            let length = sealer.seal(kind, payload, &mut out).unwrap();
            assert_eq!(out[..length], record);
            let (typed, held) = opener.open(&mut out[HEADER..length]).unwrap();
            assert_eq!((typed, &out[HEADER..HEADER + held]), (kind, payload));
        }
    }

    #[test]
    fn every_record_has_the_next_number_and_none_is_understood_out_of_turn() {
        let [mut sealer, mut opener] = keys(1);
        let mut records = Vec::new();
        for number in 1..=3_u8 {
            let mut out = [0; 64];
            let length = sealer.seal(ContentType::ApplicationData, &[number], &mut out).unwrap();
            records.push(out[HEADER..length].to_vec());
            assert_eq!(sealer.next(), u64::from(number) + 1);
        }
        for (turn, number) in [(1, false), (0, true), (0, false), (2, false), (1, true), (2, true)] {
            let before = opener.next();
            assert_eq!(opener.open(&mut records[turn].clone()).is_ok(), number, "{turn}");
            assert_eq!(opener.next(), before + u64::from(number));
        }
        let [mut last, _] = keys(u64::MAX - 1);
        let mut out = [0; 64];
        assert!(last.seal(ContentType::ApplicationData, b"", &mut out).is_ok());
        assert!(last.seal(ContentType::ApplicationData, b"", &mut out).is_err(), "numbers do not begin again");
        let [_, mut last] = keys(u64::MAX);
        assert!(last.open(&mut raw(u64::MAX, &[23])).is_err());
    }

    #[test]
    fn a_record_that_could_not_be_made_uses_up_its_number() {
        let [mut sealer, mut opener] = keys(0);
        let mut out = vec![0; PLAINTEXT_MAX + 64];
        assert!(sealer.seal(ContentType::ApplicationData, &[1; 10], &mut out[..HEADER + 10 + TAG]).is_err());
        assert!(sealer.seal(ContentType::ApplicationData, &vec![1; PLAINTEXT_MAX + 1], &mut out).is_err());
        assert_eq!(sealer.next(), 2);
        let length = sealer.seal(ContentType::ApplicationData, &vec![1; PLAINTEXT_MAX], &mut out).unwrap();
        assert_eq!(length, HEADER + PLAINTEXT_MAX + 1 + TAG);
        assert!(opener.open(&mut out[HEADER..length]).is_err(), "it is the third");
    }

    #[test]
    fn the_type_is_the_last_byte_that_is_not_zero() {
        let padded = |front: &[u8], zeros: usize| [front, &vec![0; zeros]].concat();
        let full = [vec![5; PLAINTEXT_MAX], vec![23]].concat();
        #[rustfmt::skip]
        let table: [(&str, Vec<u8>, Result<(u8, usize), &str>); 12] = [
            ("no padding",            padded(b"abc\x17", 0),                      Ok((23, 3))),
            ("padding",               padded(b"abc\x17", 300),                    Ok((23, 3))),
            ("zeros before the type", padded(b"a\0\0\x17", 2),                    Ok((23, 3))),
            ("no content",            padded(b"\x17", 0),                         Ok((23, 0))),
            ("only padding",          padded(b"\x17", PLAINTEXT_MAX),             Ok((23, 0))),
            ("an alert",              padded(b"\x01\0\x15", 1),                   Ok((21, 2))),
            ("an unknown type",       padded(b"\xff", 0),                         Ok((255, 0))),
            ("as long as can be",     full.clone(),                               Ok((23, PLAINTEXT_MAX))),
            ("no type",               padded(b"", 1),                             Err("no type")),
            ("nothing but zeros",     padded(b"", PLAINTEXT_MAX + 1),             Err("no type")),
            ("nothing at all",        padded(b"", 0),                             Err("no type")),
            ("padding beyond",        padded(&full, 1),                           Err("too long")),
        ];
        for (case, inner, want) in table {
            let [_, mut opener] = keys(3);
            let got = opener.open(&mut raw(3, &inner)).map(|(kind, length)| (u8::from(kind), length));
            let got = got.map_err(|error| match error {
                Error::PeerSentOversizedRecord => "too long",
                Error::PeerMisbehaved(PeerMisbehaved::IllegalTlsInnerPlaintext) => "no type",
                _ => "another",
            });
            assert_eq!(got, want, "{case}");
        }
    }

    #[test]
    fn what_is_changed_or_cut_is_not_the_peers() {
        let good = raw(0, b"SELECT 1\x17");
        for bit in 0..good.len() * 8 {
            let mut record = good.clone();
            record[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(keys(0)[1].open(&mut record), Err(Error::DecryptError), "bit {bit}");
        }
        for length in 0..good.len() {
            assert_eq!(keys(0)[1].open(&mut good[..length].to_vec()), Err(Error::DecryptError), "{length} bytes");
        }
        assert_eq!(keys(0)[1].open(&mut good.clone()), Ok((ContentType::ApplicationData, 8)));
    }
}
