//! Finds Postgres' server programs.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a folder must hold to be of use.
const NEEDED: [&str; 4] = ["postgres", "initdb", "pg_ctl", "pg_basebackup"];
/// Names a folder of server programs, past all searching.
const VARIABLE: &str = "PGWEIR_PG_BIN";

/// A folder that holds `postgres`, `initdb`, `pg_ctl` and `pg_basebackup`.
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
            return Self::in_directory(&directory).ok_or(NotFound { searched: vec![directory], forced: true });
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
        Err(NotFound { searched, forced: false })
    }

    /// The programs in `directory`, if all are there and `postgres --version` answers.
    #[must_use]
    pub fn in_directory(directory: &Path) -> Option<Self> {
        if !NEEDED.iter().all(|name| directory.join(name).is_file()) {
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
    /// `PGWEIR_PG_BIN` named the folder, so nothing else was looked at.
    pub forced: bool,
}

impl std::error::Error for NotFound {}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Postgres' server programs ({}) are not there. ", NEEDED.join(", "))?;
        if self.forced {
            write!(f, "{VARIABLE} names")?;
        } else {
            write!(f, "Searched:")?;
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
        let text = NotFound { searched: vec![PathBuf::from("/nowhere/bin")], forced: false }.to_string();
        for part in ["/nowhere/bin", "apt-get install postgresql", "PGWEIR_PG_BIN"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
