//! The files in `config/` that are put beside the program: scripts do what they say, and whatever a file names is there.

mod buildpack;
mod files;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A file or folder of `config/`.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

/// The text of one.
fn text(name: &str) -> String {
    fs::read_to_string(shipped(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every file of these folders, as [`shipped`] wants it.
fn files_of(folders: &[&str]) -> Vec<String> {
    let mut files = Vec::new();
    for folder in folders {
        for entry in fs::read_dir(shipped(folder)).unwrap() {
            let name = format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap());
            if shipped(&name).is_dir() { files.extend(files_of(&[&name])) } else { files.push(name) }
        }
    }
    files.sort();
    files
}

/// A program of the system, with nothing in its environment but where programs are.
fn clean(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("LC_ALL", "C.UTF-8");
    command
}

/// What a program printed, if it ended well.
#[track_caller]
fn well(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// All that a program printed.
fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// YAML by Ruby, which the tests of `ActiveRecord` need, too: its documents.
fn yaml(text: &str) -> Vec<serde_json::Value> {
    let script = "puts JSON.generate(YAML.load_stream(ENV['TEXT']))";
    let json = well(clean("ruby").args(["-ryaml", "-rjson", "-e", script]).env("TEXT", text));
    serde_json::from_str(&json).unwrap()
}
