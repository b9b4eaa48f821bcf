//! What a server may ask of us at a login, and where its password comes from.

use crate::fault::Problem;
use crate::setting::Bounds;
use crate::typed::{Kind, Raw, Typed};

/// A way in which a server may have us log in, by libpq's name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// It asks for nothing: trust, peer, or a TLS client certificate.
    None,
    /// The password itself.
    Password,
    /// The password's MD5 hash.
    Md5,
    /// SCRAM-SHA-256, with or without channel binding.
    ScramSha256,
}

impl AuthMethod {
    const ALL: [Self; 4] = [Self::None, Self::Password, Self::Md5, Self::ScramSha256];

    /// Its word in `require_auth`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Password => "password",
            Self::Md5 => "md5",
            Self::ScramSha256 => "scram-sha-256",
        }
    }

    const fn bit(self) -> u8 {
        1 << (self as u8)
    }
}

/// `require_auth`: the methods that a server may ask for, as libpq reads them.
///
/// Source: the Postgres manual, "Parameter Key Words", `require_auth`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequireAuth {
    text: String,
    allowed: u8,
}

impl Default for RequireAuth {
    fn default() -> Self {
        Self { text: String::new(), allowed: u8::MAX }
    }
}

impl RequireAuth {
    /// Whether a server may ask for this.
    #[must_use]
    pub const fn allows(&self, method: AuthMethod) -> bool {
        self.allowed & method.bit() != 0
    }

    /// As it was written; empty if everything is allowed.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn parse(text: &str) -> Result<Self, Problem> {
        let (mut named, mut negated) = (0, None);
        for word in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
            let bare = word.strip_prefix('!');
            let method = AuthMethod::ALL.into_iter().find(|method| method.as_str() == bare.unwrap_or(word));
            let method = method.ok_or(Problem::NotAMethod)?;
            if *negated.get_or_insert(bare.is_some()) != bare.is_some() {
                return Err(Problem::MixedMethods);
            }
            if named & method.bit() != 0 {
                return Err(Problem::Repeated);
            }
            named |= method.bit();
        }
        let allowed = match negated {
            None => u8::MAX,
            Some(true) => !named,
            Some(false) => named,
        };
        Ok(Self { text: text.trim().to_owned(), allowed })
    }
}

impl Typed for RequireAuth {
    const KIND: Kind = Kind::Text;

    fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem> {
        Self::parse(&String::read(raw, bounds)?)
    }

    fn show(&self) -> String {
        self.text.clone()
    }
}

/// `password_command`: a program and its arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    text: String,
    words: Vec<String>,
}

impl CommandLine {
    /// The program, and behind it its arguments; at least one word.
    #[must_use]
    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// Splits at blanks. `'...'` is taken as it is; in `"..."` and outside of quotes a backslash keeps the next
    /// character. Nothing is expanded.
    fn parse(text: &str) -> Result<Self, Problem> {
        let mut words = Vec::new();
        let mut word: Option<String> = None;
        let mut quote = None;
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match (c, quote) {
                (c, Some(open)) if c == open => quote = None,
                ('\\', None | Some('"')) => word.get_or_insert_default().push(chars.next().ok_or(Problem::Quote)?),
                ('\'' | '"', None) => {
                    quote = Some(c);
                    word.get_or_insert_default();
                }
                (c, None) if c.is_ascii_whitespace() => words.extend(word.take()),
                (c, _) => word.get_or_insert_default().push(c),
            }
        }
        words.extend(word);
        if quote.is_some() {
            return Err(Problem::Quote);
        }
        if words.first().is_none_or(String::is_empty) {
            return Err(Problem::NoCommand);
        }
        Ok(Self { text: text.to_owned(), words })
    }
}

impl Typed for CommandLine {
    const KIND: Kind = Kind::Text;

    fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem> {
        Self::parse(&String::read(raw, bounds)?)
    }

    fn show(&self) -> String {
        self.text.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn require_auth_is_read_as_libpq_reads_it() {
        use AuthMethod::{Md5, None as Trust, Password, ScramSha256};
        type Want = Result<&'static [AuthMethod], Problem>;
        #[rustfmt::skip]
        let table: [(&str, Want); 10] = [
            ("",                       Ok(&[Trust, Password, Md5, ScramSha256])),
            ("scram-sha-256",          Ok(&[ScramSha256])),
            ("none, md5",              Ok(&[Trust, Md5])),
            ("!password",              Ok(&[Trust, Md5, ScramSha256])),
            ("!none,!password,!md5",   Ok(&[ScramSha256])),
            ("md5,!none",              Err(Problem::MixedMethods)),
            ("md5,md5",                Err(Problem::Repeated)),
            ("scram",                  Err(Problem::NotAMethod)),
            ("md5,",                   Err(Problem::NotAMethod)),
            ("!",                      Err(Problem::NotAMethod)),
        ];
        for (text, want) in table {
            let got = RequireAuth::parse(text);
            let got = got.map(|read| AuthMethod::ALL.into_iter().filter(|m| read.allows(*m)).collect::<Vec<_>>());
            assert_eq!(got, want.map(<[AuthMethod]>::to_vec), "{text}");
        }
    }

    #[test]
    fn a_command_is_split_and_nothing_in_it_is_expanded() {
        type Want = Result<&'static [&'static str], Problem>;
        #[rustfmt::skip]
        let table: [(&str, Want); 10] = [
            ("/bin/token",                 Ok(&["/bin/token"])),
            ("  aws rds\tx ",              Ok(&["aws", "rds", "x"])),
            (r#"a 'b c' "d \"e\" \\""#,    Ok(&["a", "b c", r#"d "e" \"#])),
            (r"a b\ c 'd\e'",              Ok(&["a", "b c", r"d\e"])),
            (r#"a "" ''"#,                 Ok(&["a", "", ""])),
            ("sh -c 'echo $X | cat'",      Ok(&["sh", "-c", "echo $X | cat"])),
            ("a 'b",                       Err(Problem::Quote)),
            (r"a \",                       Err(Problem::Quote)),
            ("  ",                         Err(Problem::NoCommand)),
            ("'' x",                       Err(Problem::NoCommand)),
        ];
        for (text, want) in table {
            let got = CommandLine::parse(text).map(|line| line.words);
            assert_eq!(got, want.map(|words| words.iter().map(|word| (*word).to_owned()).collect()), "{text}");
        }
    }
}
