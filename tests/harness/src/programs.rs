//! Finds Postgres' server programs.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache;
use crate::error::HarnessError;
use crate::os;

/// What a folder must hold to be of use; the last one makes followers without a stop of the primary.
const NEEDED: [&str; 4] = ["postgres", "initdb", "pg_ctl", COPIES];
const COPIES: &str = "pg_basebackup";
/// Names a folder of server programs, past all searching.
const VARIABLE: &str = "PGWEIR_PG_BIN";
/// The same for those of version 18.
const VARIABLE_18: &str = "PGWEIR_PG18_BIN";

/// A folder that holds `postgres`, `initdb` and `pg_ctl`; `pg_basebackup` and `psql`, too, unless it was named for
/// its version or by `PGWEIR_PG_BIN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerPrograms {
    directory: PathBuf,
    version: String,
}

impl ServerPrograms {
    /// Looks at `PGWEIR_PG_BIN` (and nowhere else when it is set), then asks `pg_config --bindir`,
    /// then the folders of `PATH`, then those where distributions put them, newest version first.
    ///
    /// # Errors
    ///
    /// [`NotFound`], whose text says where it looked and what to install.
    pub fn find() -> Result<Self, NotFound> {
        if let Some(directory) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            let directory = PathBuf::from(directory);
            return Self::bare(&directory).ok_or(NotFound { searched: vec![directory], forced: Some(VARIABLE) });
        }
        let mut searched = Vec::new();
        for directory in candidates() {
            if searched.contains(&directory) {
                continue;
            }
            if let Some(found) = Self::in_directory(&directory) {
                return Ok(found);
            }
            searched.push(directory);
        }
        Err(NotFound { searched, forced: None })
    }

    /// Postgres 18, for what no older server speaks: where `PGWEIR_PG18_BIN` says, else where `make deps` puts it. It
    /// may lack all client programs.
    ///
    /// # Errors
    ///
    /// [`NotFound`].
    pub fn find_18() -> Result<Self, NotFound> {
        let given = env::var_os(VARIABLE_18).filter(|value| !value.is_empty()).map(PathBuf::from);
        let searched: Vec<PathBuf> = given.or_else(cache::postgres_18).into_iter().collect();
        let found = searched.first().and_then(|directory| Self::bare(directory));
        found.ok_or(NotFound { searched, forced: Some(VARIABLE_18) })
    }

    /// The programs in `directory`, if all are there and `postgres --version` answers.
    #[must_use]
    pub fn in_directory(directory: &Path) -> Option<Self> {
        directory.join(COPIES).is_file().then(|| Self::bare(directory))?
    }

    /// [`ServerPrograms::in_directory`] that may lack what only clients need.
    fn bare(directory: &Path) -> Option<Self> {
        if !NEEDED.iter().filter(|name| **name != COPIES).all(|name| directory.join(name).is_file()) {
            return None;
        }
        let output = Command::new(directory.join("postgres")).arg("--version").env("LC_ALL", "C").output().ok()?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let version = String::from_utf8_lossy(&output.stdout).split(") ").nth(1)?.split_whitespace().next()?.to_owned();
        Some(Self { directory: directory.to_path_buf(), version })
    }

    /// Their version, such as `15.18`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Their major version, such as 15.
    #[must_use]
    pub fn major(&self) -> u32 {
        let digits = self.version.split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|major| major.parse().ok()).unwrap_or(0)
    }

    /// The folder.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether it can copy a running primary.
    pub(crate) fn has_basebackup(&self) -> bool {
        self.directory.join(COPIES).is_file()
    }

    /// These programs where the account that runs them may pass: themselves, or a copy of their installation in
    /// `place`. Postgres finds its other files relative to its programs.
    pub(crate) fn reachable(&self, place: &Path) -> Result<Self, HarnessError> {
        let Some(installation) = self.directory.parent().filter(|_| !os::may_pass(&self.directory)) else {
            return Ok(self.clone());
        };
        let mut copy = os::command("cp");
        copy.arg("-a").arg(installation).arg(place);
        os::run(copy, Stdio::null())?;
        Ok(Self { directory: place.join("bin"), version: self.version.clone() })
    }

    /// The path of the program `name`.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// No folder holds all of Postgres' server programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotFound {
    /// The folders looked at.
    pub searched: Vec<PathBuf>,
    /// This variable names the folder, so nothing else was looked at.
    pub forced: Option<&'static str>,
}

impl std::error::Error for NotFound {}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Postgres' server programs ({}) are not there. ", NEEDED.join(", "))?;
        match self.forced {
            Some(variable) => write!(f, "{variable} names, or `make deps` makes")?,
            None => write!(f, "Searched:")?,
        }
        for directory in &self.searched {
            write!(f, " {}", directory.display())?;
        }
        write!(
            f,
            ".\nOn Debian or Ubuntu: apt-get install postgresql (or run `make deps`). \
             Elsewhere: install the server package, or set {VARIABLE} to its bin folder."
        )
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output()
        && output.status.success()
    {
        let text = String::from_utf8_lossy(&output.stdout);
        found.push(PathBuf::from(text.trim()));
    }
    if let Some(path) = env::var_os("PATH") {
        found.extend(env::split_paths(&path));
    }
    for (parent, prefix) in [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/opt", "pgsql"),
        ("/opt", "postgres"),
        ("/opt/homebrew/opt", "postgresql"),
        ("/usr/local/opt", "postgresql"),
    ] {
        found.extend(newest_first(Path::new(parent), prefix));
    }
    found.push(PathBuf::from("/usr/local/pgsql/bin"));
    found.push(PathBuf::from("/usr/lib/postgresql/bin"));
    found
}

/// The `bin` folders of the entries of `parent` whose name starts with `prefix`, by falling number.
fn newest_first(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    let mut found: Vec<(Vec<u32>, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let number = numbers(name.strip_prefix(prefix)?);
            Some((number, entry.path().join("bin")))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, path)| path).collect()
}

/// The numbers in a name, in order: `9.6` is `[9, 6]`, `17` is `[17]`.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::{NotFound, ServerPrograms, newest_first};
    use std::fs;
    use std::path::PathBuf;

    #[test]
    fn versions_sort_by_number_not_by_text() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["pgsql-9.6", "pgsql-17", "other", "pgsql-10"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let want: Vec<PathBuf> =
            ["pgsql-17", "pgsql-10", "pgsql-9.6"].map(|name| parent.path().join(name).join("bin")).into();
        assert_eq!(newest_first(parent.path(), "pgsql-"), want);
    }

    #[test]
    fn a_folder_that_lacks_one_program_is_none() {
        let found = ServerPrograms::find().unwrap();
        let partial = tempfile::tempdir().unwrap();
        for name in ["postgres", "initdb", "pg_ctl"] {
            std::os::unix::fs::symlink(found.program(name), partial.path().join(name)).unwrap();
        }
        assert_eq!(ServerPrograms::in_directory(partial.path()), None);
        let last = "pg_basebackup";
        std::os::unix::fs::symlink(found.program(last), partial.path().join(last)).unwrap();
        let whole = ServerPrograms::in_directory(partial.path()).unwrap();
        assert_eq!(whole.version(), found.version());
        assert!(found.major() >= 10, "{}", found.version());
    }

    #[test]
    fn not_found_says_where_it_looked_and_what_to_install() {
        let text = NotFound { searched: vec![PathBuf::from("/nowhere/bin")], forced: None }.to_string();
        for part in ["/nowhere/bin", "apt-get install postgresql", "PGWEIR_PG_BIN"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
