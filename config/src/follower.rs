//! `followers`: the followers of a database's server.

use crate::fault::Problem;
use crate::setting::Bounds;
use crate::socket::is_socket_dir;
use crate::typed::{Kind, Raw, Typed};
use crate::url::{Target, UrlProblem};

/// Followers of one database, at most.
pub const FOLLOWERS_MAX: usize = 16;

/// The greatest weight.
const WEIGHT_MAX: u32 = 100;

/// The port of a follower that names none.
const PORT: u16 = 5432;

/// What is wrong with one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FollowerFault {
    /// Not a host, an address, a socket's directory or a URL, or its port is none.
    #[error("{0}")]
    Address(UrlProblem),
    /// A URL with a user, a password, a database or a query.
    #[error("the URL has more than host and port")]
    More,
    /// What stands behind it is no weight.
    #[error("what stands behind it is not weight=1 to weight=100")]
    Weight,
    /// Nothing between two commas.
    #[error("it is empty")]
    Empty,
    /// Another one has the same host and port.
    #[error("it is there twice")]
    Repeated,
}

impl FollowerFault {
    /// How to mend it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Address(_) => "Write host:port; an IPv6 address stands in brackets, such as [::1]:5432.",
            Self::More => "Write host:port: user, password, database and TLS are those of the entry.",
            Self::Weight => "Write host:port, a blank and weight=2, or a comma in front of the next one.",
            Self::Empty => "Remove a comma.",
            Self::Repeated => "Keep one of the two.",
        }
    }
}

/// Where a follower is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Follower {
    /// Host name, address, or the directory of a Unix-domain socket.
    pub host: String,
    /// TCP port, or the number in the socket's name.
    pub port: u16,
    /// Its share of the reads, relative to the others'.
    pub weight: u32,
}

impl Follower {
    /// One of weight 1.
    #[must_use]
    pub const fn new(host: String, port: u16) -> Self {
        Self { host, port, weight: 1 }
    }

    /// `host:port`, as logs and metrics call it.
    #[must_use]
    pub fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn parse(text: &str) -> Result<Self, FollowerFault> {
        let mut words = text.split_whitespace();
        let place = words.next().ok_or(FollowerFault::Empty)?;
        let mut follower = Self::place(place)?;
        if let Some(word) = words.next() {
            let weight = word.strip_prefix("weight=").and_then(|weight| weight.parse().ok());
            let weight = weight.filter(|weight| (1..=WEIGHT_MAX).contains(weight));
            follower.weight = weight.filter(|_| words.next().is_none()).ok_or(FollowerFault::Weight)?;
        }
        Ok(follower)
    }

    fn place(text: &str) -> Result<Self, FollowerFault> {
        let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
        let (path, port) = text.rsplit_once(':').unwrap_or((text, ""));
        if !is_url && is_socket_dir(path) {
            let port = if port.is_empty() { Some(PORT) } else { port.parse().ok().filter(|port| *port > 0) };
            return Ok(Self::new(path.to_owned(), port.ok_or(FollowerFault::Address(UrlProblem::Port))?));
        }
        let url = if is_url { text.to_owned() } else { format!("postgres://{text}") };
        let target = Target::parse(&url);
        let more = [target.user.is_some(), target.password.is_some(), target.dbname.is_some()];
        if more.contains(&true) || !target.options.is_empty() || target.problems.contains(&UrlProblem::QueryKey) {
            return Err(FollowerFault::More);
        }
        if let Some(problem) = target.problems.first() {
            return Err(FollowerFault::Address(*problem));
        }
        let host = target.host.ok_or(FollowerFault::Address(UrlProblem::Host))?;
        Ok(Self::new(host, target.port.unwrap_or(PORT)))
    }
}

/// The followers of a database, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FollowerList {
    text: String,
    followers: Vec<Follower>,
}

impl FollowerList {
    /// These, those beyond [`FOLLOWERS_MAX`] and repeated ones left out.
    #[must_use]
    pub fn new(all: impl IntoIterator<Item = Follower>) -> Self {
        let mut followers: Vec<Follower> = Vec::new();
        for follower in all {
            let is_new = !followers.iter().any(|other| other.host == follower.host && other.port == follower.port);
            if is_new && followers.len() < FOLLOWERS_MAX {
                followers.push(follower);
            }
        }
        let text: Vec<String> = followers
            .iter()
            .map(|follower| match follower.weight {
                1 => follower.address(),
                weight => format!("{} weight={weight}", follower.address()),
            })
            .collect();
        Self { text: text.join(", "), followers }
    }

    /// Each of them; at least one.
    #[must_use]
    pub fn all(&self) -> &[Follower] {
        &self.followers
    }

    fn parse(text: &str) -> Result<Self, Problem> {
        let mut followers: Vec<Follower> = Vec::new();
        for (index, item) in text.split(',').enumerate() {
            let fault = |fault| Problem::Follower { item: index.saturating_add(1), fault };
            let follower = Follower::parse(item).map_err(fault)?;
            if followers.iter().any(|other| other.host == follower.host && other.port == follower.port) {
                return Err(fault(FollowerFault::Repeated));
            }
            if followers.len() == FOLLOWERS_MAX {
                return Err(Problem::TooManyFollowers { limit: FOLLOWERS_MAX });
            }
            followers.push(follower);
        }
        Ok(Self { text: text.trim().to_owned(), followers })
    }
}

impl Typed for FollowerList {
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
    fn followers_are_hosts_with_ports_and_weights() {
        type Want = Result<&'static [(&'static str, u16, u32)], &'static str>;
        #[rustfmt::skip]
        let table: [(&str, &str, Want); 19] = [
            ("host",             "b",                              Ok(&[("b", 5432, 1)])),
            ("port",             "b:5433",                         Ok(&[("b", 5433, 1)])),
            ("two",              "b:1,c:2",                        Ok(&[("b", 1, 1), ("c", 2, 1)])),
            ("same host",        "b:1, b:2",                       Ok(&[("b", 1, 1), ("b", 2, 1)])),
            ("weight",           " b:1  weight=3 , c ",            Ok(&[("b", 1, 3), ("c", 5432, 1)])),
            ("IPv6",             "[::1]:5433",                     Ok(&[("::1", 5433, 1)])),
            ("socket",           "/run/pg:5433, @pg",              Ok(&[("/run/pg", 5433, 1), ("@pg", 5432, 1)])),
            ("URL",              "postgres://b:5433 weight=2",     Ok(&[("b", 5433, 2)])),
            ("user",             "postgres://u@b:5433",            Err("the follower 1: the URL has more than host and port")),
            ("password",         "a, postgres://u:p@b/d",          Err("the follower 2: the URL has more than host and port")),
            ("query",            "postgres://b?sslmode=disable",   Err("the follower 1: the URL has more than host and port")),
            ("unknown query",    "postgres://b?x=1",               Err("the follower 1: the URL has more than host and port")),
            ("no host",          "postgres://:5433",               Err("the follower 1: the host of the URL is not one name, IP address or encoded directory")),
            ("bad port",         "b:99999",                        Err("the follower 1: the port of the URL is not 1..=65535")),
            ("empty",            "b,,c",                           Err("the follower 2: it is empty")),
            ("no weight",        "b weight=0",                     Err("the follower 1: what stands behind it is not weight=1 to weight=100")),
            ("no comma",         "b c",                            Err("the follower 1: what stands behind it is not weight=1 to weight=100")),
            ("words behind",     "b weight=2 c",                   Err("the follower 1: what stands behind it is not weight=1 to weight=100")),
            ("twice",            "b:5432, b",                      Err("the follower 2: it is there twice")),
        ];
        for (name, text, want) in table {
            let got = FollowerList::parse(text).map_err(|problem| problem.to_string());
            let got = got.map(|list| list.followers);
            let want = want.map_err(str::to_owned).map(|all| {
                let made = all.iter().map(|(host, port, weight)| Follower {
                    host: (*host).to_owned(),
                    port: *port,
                    weight: *weight,
                });
                made.collect::<Vec<_>>()
            });
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn what_is_put_together_reads_back_as_the_same() {
        let made = [("b", 1, 1), ("::1", 2, 3), ("b", 1, 7)];
        let list = FollowerList::new(made.map(|(host, port, weight)| Follower { host: host.to_owned(), port, weight }));
        assert_eq!(list.show(), "b:1, [::1]:2 weight=3");
        assert_eq!(FollowerList::parse(&list.show()), Ok(list));
        let many = (1..40).map(|port| Follower::new("b".to_owned(), port));
        assert_eq!(FollowerList::new(many).all().len(), FOLLOWERS_MAX);
    }
}
