//! The census as it is shown: whose the connections under each limit are, by name.

use std::time::Instant;

use hashbrown::HashMap;

use super::account::{Account, CLAIMS_MAX, headroom};
use super::census::{Census, Row, Scope};
use super::tag::{self, Mark};
use crate::stats::{Holder, Holders, ScopeStanding, Standing};

/// Holders of each kind that are listed by name, per limit.
const LISTED_MAX: usize = 100;

/// One connection.
#[derive(Clone, Copy, Debug)]
struct Line {
    pid: Option<u32>,
    here: bool,
    same_role: bool,
    mark: Mark,
    /// An index of [`Roll::names`].
    name: usize,
}

/// The connections of a census, by name.
#[derive(Debug, Default)]
pub struct Roll {
    lines: Vec<Line>,
    /// Tags of pgweirs (true), and what other programs call themselves.
    names: Vec<(bool, Box<[u8]>)>,
    tags: HashMap<Box<[u8]>, usize, foldhash::fast::RandomState>,
    others: HashMap<Box<[u8]>, usize, foldhash::fast::RandomState>,
}

/// Whose a connection is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    Own,
    Peer,
    Foreigner,
}

impl Roll {
    /// Takes in a row that counts, of the server process `pid`.
    pub fn row(&mut self, row: &Row<'_>, pid: Option<u32>) {
        let tag = tag::split(row.name).map(|(_, tag)| tag);
        let (is_tag, name) = (tag.is_some(), tag.map_or(row.name, |tag| tag.member));
        let numbers = if is_tag { &mut self.tags } else { &mut self.others };
        let name = if let Some(number) = numbers.get(name) {
            *number
        } else {
            let number = self.names.len();
            self.names.push((is_tag, name.into()));
            numbers.insert(name.into(), number);
            number
        };
        let mark = tag.map_or(Mark::Plain, |tag| tag.mark);
        self.lines.push(Line { pid, here: row.here, same_role: row.same_role, mark, name });
    }

    /// How the limits of its `census` stand, seen from a process whose own connections are those of which `is_own` is
    /// true, by process id or tag. `account` tells how its member stands in a scope, if it shares the limits.
    #[must_use]
    pub fn standing(
        &self,
        census: &Census,
        taken: Instant,
        is_own: impl Fn(Option<u32>, Option<&[u8]>) -> bool,
        account: impl Fn(Scope) -> Option<Account>,
    ) -> Standing {
        let whose = |line: &Line| match self.names.get(line.name) {
            Some((is_tag, name)) if is_own(line.pid, is_tag.then_some(&**name)) => Whose::Own,
            Some((true, _)) => Whose::Peer,
            Some((false, _)) | None => Whose::Foreigner,
        };
        let whose: Vec<Whose> = self.lines.iter().map(whose).collect();
        let scopes = Scope::ALL.into_iter().map(|scope| self.scope(scope, census, &whose, account(scope).as_ref()));
        // No fleet, no limit of it.
        let scopes = scopes.filter(|standing| standing.scope != Scope::Fleet.as_str() || standing.limit.is_some());
        Standing { taken, scopes: scopes.collect() }
    }

    fn scope(&self, scope: Scope, census: &Census, whose: &[Whose], account: Option<&Account>) -> ScopeStanding {
        let limit = census.limit(scope);
        let headroom = limit.map_or(0, headroom);
        let mut standing = ScopeStanding {
            scope: scope.as_str(),
            limit,
            headroom,
            used: 0,
            own: Holder::default(),
            peers: Holders::default(),
            foreigners: Holders::default(),
            claims: 0,
            probes: 0,
            waiting: 0,
            members: account.map(|account| account.peers),
            share: account.map(Account::share),
            usable: account.map_or(limit.map_or(u32::MAX, |limit| limit - headroom), Account::purse),
        };
        let mut named: HashMap<(bool, usize), Holder, foldhash::fast::RandomState> = HashMap::default();
        for (line, whose) in self.lines.iter().zip(whose) {
            let counts = match scope {
                Scope::Role => line.same_role,
                Scope::Database => line.here,
                Scope::Server | Scope::Fleet => true,
            };
            if !counts {
                continue;
            }
            let claims = match line.mark {
                Mark::Claims(claims, until) if !census.are_over(until) => claims.min(CLAIMS_MAX),
                _ => 0,
            };
            let probes = u32::from(matches!(line.mark, Mark::Coming(..) | Mark::Proving(..) | Mark::Waiting(_)));
            standing.waiting += u32::from(matches!(line.mark, Mark::Waiting(_)));
            standing.probes += probes;
            standing.claims += claims;
            standing.used += 1 + claims;
            let holder = match whose {
                Whose::Own => &mut standing.own,
                Whose::Peer => named.entry((true, line.name)).or_default(),
                Whose::Foreigner => named.entry((false, line.name)).or_default(),
            };
            holder.connections += 1;
            holder.claims += claims;
            holder.probes += probes;
        }
        let mut all = [(true, &mut standing.peers), (false, &mut standing.foreigners)];
        for ((is_peer, at), mut holder) in named {
            let Some((_, holders)) = all.iter_mut().find(|(peers, _)| *peers == is_peer) else { continue };
            let name = self.names.get(at).map(|(_, name)| &**name).unwrap_or_default();
            holder.name = String::from_utf8_lossy(name).into();
            holders.used += holder.connections + holder.claims;
            holders.listed.push(holder);
        }
        for (_, holders) in all {
            holders.listed.sort_by(|a, b| (b.connections, &a.name).cmp(&(a.connections, &b.name)));
            holders.unlisted = u32::try_from(holders.listed.len().saturating_sub(LISTED_MAX)).unwrap_or(u32::MAX);
            holders.listed.truncate(LISTED_MAX);
        }
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::super::census::{Limits, Process};
    use super::*;
    use std::time::Duration;

    fn taken(rows: &[(&str, u32, bool, bool)], limits: Limits, fleet: Option<u32>) -> (Census, Roll) {
        let (mut census, mut roll) = (Census::new(limits, fleet), Roll::default());
        for (name, pid, here, same_role) in rows {
            let row = Row {
                name: name.as_bytes(),
                database: u32::from(*here),
                here: *here,
                role: u32::from(*same_role),
                same_role: *same_role,
                process: Process::Client,
                age: None,
            };
            assert!(census.row(&row));
            roll.row(&row, Some(*pid));
        }
        (census, roll)
    }

    #[test]
    fn every_connection_is_somebodys_and_the_sum_is_what_decisions_are_made_by() {
        let rows = [
            ("app [pgweir a/1#1 +2]", 1, true, true),
            ("[pgweir a/1#2]", 2, true, true),
            // A client has renamed it, and it is ours all the same.
            ("renamed", 3, true, true),
            ("[pgweir b/2#1]", 4, true, true),
            ("[pgweir b/2#2 ?]", 5, true, false),
            ("[pgweir c/3 ?1@1+1]", 6, false, false),
            ("psql", 7, true, true),
            ("psql", 8, false, false),
            ("", 9, false, true),
        ];
        let limits = Limits { role: Some(20), database: None, server: Some(100) };
        let (census, roll) = taken(&rows, limits, Some(12));
        let is_own = |pid: Option<u32>, tag: Option<&[u8]>| pid == Some(3) || tag == Some(b"a/1");
        let account = |scope| census.account(scope, "a/1", Duration::MAX);
        let standing = roll.standing(&census, Instant::now(), is_own, account);
        let figures = |scope: &ScopeStanding| {
            let names =
                |of: &Holders| of.listed.iter().map(|one| format!("{}:{}", one.name, one.connections)).collect();
            let (peers, foreigners): (Vec<String>, Vec<String>) = (names(&scope.peers), names(&scope.foreigners));
            (scope.scope, scope.used, scope.own.connections, peers.join(" "), foreigners.join(" "))
        };
        let got: Vec<_> = standing.scopes.iter().map(figures).collect();
        let want = [
            ("role", 8, 3, "b/2:1", ":1 psql:1"),
            ("database", 8, 3, "b/2:2", "psql:1"),
            ("server", 11, 3, "b/2:2 c/3:1", "psql:2 :1"),
            ("fleet", 11, 3, "b/2:2 c/3:1", "psql:2 :1"),
        ];
        let want: Vec<_> = want.map(|(a, b, c, d, e)| (a, b, c, d.to_owned(), e.to_owned())).into();
        assert_eq!(got, want);
        for scope in Scope::ALL {
            let shown = standing.scopes.iter().find(|shown| shown.scope == scope.as_str()).unwrap();
            let Some(account) = account(scope) else { continue };
            assert_eq!((shown.used, shown.claims, shown.waiting), (account.used(), account.claims, account.waiting));
            assert_eq!(shown.used, shown.own.connections + shown.own.claims + shown.peers.used + shown.foreigners.used);
        }
        assert_eq!(standing.binding().map(|scope| scope.scope), Some("fleet"));
        assert_eq!(standing.scopes[1].room(), None, "the database has no limit");
    }

    #[test]
    fn there_are_no_more_names_than_may_be_listed() {
        let rows: Vec<(String, u32, bool, bool)> = (0..250).map(|n| (format!("app {n}"), n, true, true)).collect();
        let rows: Vec<(&str, u32, bool, bool)> = rows.iter().map(|(name, pid, a, b)| (&**name, *pid, *a, *b)).collect();
        let (census, roll) = taken(&rows, Limits { server: Some(300), ..Limits::default() }, None);
        let standing = roll.standing(&census, Instant::now(), |_, _| false, |_| None);
        let scope = standing.binding().unwrap();
        assert_eq!((scope.foreigners.listed.len(), scope.foreigners.unlisted, scope.foreigners.used), (100, 150, 250));
        assert_eq!((scope.headroom, scope.room(), standing.scopes.len()), (30, Some(20), 3));
    }
}
