//! Every secret that the tests use, and the search for them in what pgweir says.
//!
//! Nobody has to remember it: the passwords in the SQL that [`Cluster::psql`](crate::Cluster::psql) runs and what it finds of
//! `rolpassword`, those in pgweir's configuration and in the files that this names (keys, user files, password files), and
//! those that [`Wire`](crate::wire::Wire) logs in with are kept for as long as the process lives. [`Pgweir`](crate::Pgweir)
//! is searched for them when it stops, its log and its last answers over HTTP; `Wire` searches the errors and notices that it
//! gets. Whatever else pgweir writes, [`assert_none_in`] searches; a secret that comes another way, [`keep`] makes known.

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aho_corasick::{AhoCorasick, AhoCorasickKind};

/// Bytes: a shorter secret cannot be told from a word, and is not searched for.
pub const SHORTEST: usize = 8;

/// What only a secret looks like, whoever it belongs to.
const SHAPES: [&str; 2] = ["SCRAM-SHA-256$", "PRIVATE KEY-----"];

static KNOWN: Mutex<Known> = Mutex::new(Known { secrets: BTreeSet::new(), search: None });

struct Known {
    secrets: BTreeSet<String>,
    /// Of all of them; `None` when one has come in since.
    search: Option<Arc<AhoCorasick>>,
}

fn known() -> MutexGuard<'static, Known> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a secret known: a password or a token; of a SCRAM verifier also its two keys; of a private key (PEM) each line.
pub fn keep(secret: &str) {
    if secret.contains("-----BEGIN") {
        let mut private = false;
        for line in secret.lines() {
            if line.starts_with("-----") {
                private = line.contains("BEGIN") && line.contains("PRIVATE KEY");
            } else if private {
                keep_one(line.trim());
            }
        }
        return;
    }
    if let Some(rest) = secret.strip_prefix("SCRAM-SHA-256$") {
        // The salt in front of them is no secret: it is told to whoever asks.
        rest.split(['$', ':']).skip(2).for_each(keep_one);
    }
    keep_one(secret);
}

fn keep_one(secret: &str) {
    let mut known = known();
    if secret.len() >= SHORTEST && known.secrets.insert(secret.to_owned()) {
        known.search = None;
    }
}

/// Makes every `PASSWORD '...'` of this SQL known.
///
/// # Panics
///
/// If one is too short to be searched for: a test's password has to be one that nothing else looks like.
#[allow(clippy::panic, reason = "test support: a test's failure is a panic")]
pub fn keep_sql(sql: &str) {
    for password in literals_behind(sql, "PASSWORD ") {
        assert!(
            password.len() >= SHORTEST || password.is_empty(),
            "the password {password:?} is too short to be found in a log: make it {SHORTEST} bytes"
        );
        keep(&password);
    }
}

/// The SQL literals, `'...'` or `E'...'`, that stand right behind `word`.
fn literals_behind(sql: &str, word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in sql.match_indices(word) {
        let text = sql.get(at + word.len()..).unwrap_or_default();
        let escapes = text.starts_with('E');
        let Some(text) = text.strip_prefix('E').unwrap_or(text).strip_prefix('\'') else { continue };
        let (mut literal, mut chars) = (String::new(), text.chars().peekable());
        while let Some(c) = chars.next() {
            match c {
                '\'' if chars.peek() == Some(&'\'') => literal.extend(chars.next()),
                '\'' => break,
                '\\' if escapes => literal.extend(chars.next()),
                c => literal.push(c),
            }
        }
        found.push(literal);
    }
    found
}

/// Makes what a query found known, if it looks like a stored password: a SCRAM verifier or an MD5 hash.
pub fn keep_answer(text: &str) {
    for word in text.split(['|', '\n']) {
        let is_md5 = word.strip_prefix("md5").is_some_and(|hash| hash.len() == 32 && hash.bytes().all(is_hexadecimal));
        if word.starts_with("SCRAM-SHA-256$") || is_md5 {
            keep(word);
        }
    }
}

fn is_hexadecimal(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

/// Makes the secrets of a configuration of pgweir known, and those in the files that it names. One that is no TOML has none.
pub fn keep_config(toml: &str) {
    if let Ok(table) = toml.parse::<toml::Table>() {
        keep_table(&table);
    }
}

fn keep_table(table: &toml::Table) {
    for (key, value) in table {
        match (key.as_str(), value) {
            (_, toml::Value::Table(table)) => keep_table(table),
            ("password" | "http_token", toml::Value::String(secret)) => keep(secret),
            ("password_file" | "sslkey", toml::Value::String(path)) => keep_file(path),
            ("auth_file", toml::Value::String(path)) => keep_user_file(path),
            (key, toml::Value::String(path)) if key.ends_with("_key_file") => keep_file(path),
            (_, toml::Value::String(text)) => keep_url(text),
            _ => {}
        }
    }
}

/// Makes the password of a `scheme://user:password@...` known, as it stands there.
pub fn keep_url(url: &str) {
    let authority = url.split_once("://").and_then(|(_, rest)| rest.split_once('@'));
    if let Some((_, password)) = authority.and_then(|(user, _)| user.split_once(':')) {
        keep(password);
    }
}

fn keep_file(path: &str) {
    // One that is not there holds nothing; that is what some tests are about.
    if let Ok(text) = fs::read_to_string(path) {
        keep(text.trim_end_matches(['\r', '\n']));
    }
}

/// A user file: lines of `"name" "secret"`; faulty ones as far as they go.
fn keep_user_file(path: &str) {
    for line in fs::read_to_string(path).unwrap_or_default().lines() {
        if let Some(secret) = line.split('"').nth(3) {
            keep(secret);
        }
    }
}

/// The first secret in `text`: the line that it is in, and the secret.
#[must_use]
pub fn found_in(text: &[u8]) -> Option<(String, String)> {
    let search = search()?;
    let hit = search.find(text)?;
    let (before, secret) = (text.get(..hit.start())?, text.get(hit.range())?);
    let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let line = text.get(start..)?.split(|byte| *byte == b'\n').next()?;
    let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(500).collect();
    Some((told(line), told(secret)))
}

fn search() -> Option<Arc<AhoCorasick>> {
    let mut known = known();
    if known.search.is_none() {
        let words = known.secrets.iter().map(String::as_str).chain(SHAPES);
        let mut builder = AhoCorasick::builder();
        let built = builder.kind(Some(AhoCorasickKind::ContiguousNFA)).prefilter(false).build(words);
        known.search = built.ok().map(Arc::new);
    }
    known.search.clone()
}

/// Fails the test if one of the secrets is in `text`.
///
/// # Panics
///
/// If one is.
#[track_caller]
#[allow(clippy::panic, reason = "test support: a test's failure is a panic")]
pub fn assert_none_in(what: &str, text: impl AsRef<[u8]>) {
    if let Some((line, secret)) = found_in(text.as_ref()) {
        panic!("the secret {secret:?} is in {what}: {line}");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::{found_in, keep, keep_answer, keep_config, keep_sql, keep_url, literals_behind};

    fn is_found(text: &str) -> bool {
        found_in(format!("level=info msg=\"before\"\nlevel=info msg=\"a {text} b\"\n").as_bytes()).is_some()
    }

    #[test]
    fn a_secret_is_found_once_it_is_known_from_wherever_it_comes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (users, token) = (path("users.txt"), path("token"));
        std::fs::write(&users, "; users\n\"a\" \"of-a-user-file\"\nbroken\n").unwrap();
        std::fs::write(&token, "of-a-password-file\r\n").unwrap();
        let pem = "-----BEGIN CERTIFICATE-----\npublic/public/public\n-----END CERTIFICATE-----\n\
                   -----BEGIN PRIVATE KEY-----\nprivate/private/private\n-----END PRIVATE KEY-----\n";
        let words = [
            "of-a-client",
            "of-a-role",
            "it's-of-a-role",
            "of-a-configuration",
            "of-a-url",
            "of-a-user-file",
            "of-a-password-file",
            "md50123456789abcdef0123456789abcdef",
            "stored+key+stored+key",
            "server+key+server+key",
            "private/private/private",
        ];
        for word in words {
            assert!(!is_found(word), "{word} is known already");
        }
        keep("of-a-client");
        keep_sql(
            "CREATE ROLE a LOGIN PASSWORD 'of-a-role'; ALTER ROLE a PASSWORD 'it''s-of-a-role' VALID UNTIL '2001-01-01'",
        );
        keep_url("postgres://app:of-a-url@localhost/app");
        keep_answer(
            "a|md50123456789abcdef0123456789abcdef\nb|SCRAM-SHA-256$4096:the+salt+of+it$stored+key+stored+key:server+key+server+key",
        );
        keep_config(&format!(
            "[auth]\nauth_file = {users:?}\n[databases.app]\npassword_file = {token:?}\n\
             [users.app]\npassword = \"of-a-configuration\"\n"
        ));
        keep(pem);
        for word in words {
            let (line, secret) = found_in(format!("one\ntwo {word} more\nthree").as_bytes()).unwrap();
            assert_eq!((line, secret), (format!("two {word} more"), word.to_owned()));
        }
        for word in ["2001-01-01", "public/public/public", "the+salt+of+it", "localhost/app"] {
            assert!(!is_found(word), "{word} is no secret");
        }
        assert!(is_found("SCRAM-SHA-256$4096:whose"), "a verifier is one, known or not");
    }

    #[test]
    fn words_that_are_too_short_are_not_searched_for() {
        keep("level");
        keep("");
        assert!(!is_found("level"));
    }

    #[test]
    fn literals_are_read_as_the_server_reads_them() {
        let sql = r"ALTER ROLE a PASSWORD E'a\\b\'c''d'; ALTER ROLE b PASSWORD 'a\b'; ALTER ROLE c PASSWORD NULL";
        assert_eq!(literals_behind(sql, "PASSWORD "), [r"a\b'c'd", r"a\b"]);
    }

    #[test]
    #[should_panic(expected = "too short to be found")]
    fn a_password_that_nobody_could_find_is_refused() {
        keep_sql("ALTER ROLE a PASSWORD 'short'");
    }
}
