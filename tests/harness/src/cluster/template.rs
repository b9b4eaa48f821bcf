//! A data directory, fresh from `initdb` or, faster, copied from one made earlier.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::options::{APP_DATABASE, APP_PASSWORD, APP_USER, SUPERUSER, SUPERUSER_PASSWORD};
use crate::cache;
use crate::error::{Doing, HarnessError};
use crate::home::Home;
use crate::os;
use crate::programs::ServerPrograms;

/// Counts up when what a template holds changes.
const REVISION: u32 = 1;

/// Makes the data directory in `home`, with the superuser's password, the role `app` and its
/// database.
pub(super) fn place(programs: &ServerPrograms, home: &Home) -> Result<PathBuf, HarnessError> {
    let data = home.path().join("data");
    let Some((cache, template)) = template_path(programs) else {
        make(programs, home, &data)?;
        return Ok(data);
    };
    if !template.exists() {
        // One process makes it, the others wait for it. Without the lock it is only made twice.
        let lock = File::create(cache.join("lock"));
        let _held = lock.as_ref().map(File::lock);
        if !template.exists() {
            make(programs, home, &data)?;
            keep(&data, &cache, &template);
            return Ok(data);
        }
    }
    copy(&template, &data)?;
    Ok(data)
}

/// The cache folder, made if need be, and the template's place in it; `None` where there is none.
fn template_path(programs: &ServerPrograms) -> Option<(PathBuf, PathBuf)> {
    let cache = cache::directory()?.join("clusters");
    fs::create_dir_all(&cache).ok()?;
    let uid = os::account().map_or_else(os::effective_uid, |account| account.uid);
    let name = format!("pg{}-uid{uid}-r{REVISION}", programs.version());
    let template = cache.join(name);
    Some((cache, template))
}

/// Stores a copy under its final name only when whole. A failure costs the next one its speed,
/// nothing else.
fn keep(data: &Path, cache: &Path, template: &Path) {
    let partial = cache.join(format!("partial-{}", std::process::id()));
    if copy(data, &partial).and_then(|()| fs::rename(&partial, template).doing("renaming", &partial)).is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
}

/// Copies a directory with owners and modes.
fn copy(from: &Path, to: &Path) -> Result<(), HarnessError> {
    let mut command = os::command("cp");
    command.arg("-a").arg(from).arg(to);
    os::run(command, Stdio::null()).map(drop)
}

/// The same by `initdb`: a system of its own.
pub(super) fn make(programs: &ServerPrograms, home: &Home, data: &Path) -> Result<(), HarnessError> {
    let mut initdb = os::server_command(programs.program("initdb"), home.path());
    initdb.arg("-D").arg(data).args([
        "--username",
        SUPERUSER,
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C",
        "--no-sync",
    ]);
    os::run(initdb, Stdio::null())?;

    // Single-user mode reads one command per line (postgres(1)) and needs no port.
    let commands = format!(
        "SET password_encryption = 'scram-sha-256'\n\
         ALTER ROLE {SUPERUSER} PASSWORD '{SUPERUSER_PASSWORD}'\n\
         CREATE ROLE {APP_USER} LOGIN PASSWORD '{APP_PASSWORD}'\n\
         CREATE DATABASE {APP_DATABASE} OWNER {APP_USER}\n"
    );
    let script = home.path().join("template.sql");
    fs::write(&script, commands).doing("writing", &script)?;
    let input = File::open(&script).doing("opening", &script)?;
    let mut single = os::server_command(programs.program("postgres"), home.path());
    single.args(["--single", "-F", "-c", "exit_on_error=true", "-D"]);
    single.arg(data).arg("postgres");
    os::run(single, Stdio::from(input)).map(drop)
}
