//! `password_file`: a password in a file of its own.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};

use super::{PASSWORD_MAX, as_password};

/// A file that holds a password and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PasswordFile {
    path: String,
}

/// What is in it.
pub(super) struct Contents {
    pub(super) password: Vec<u8>,
    /// Others than its owner and group may read or change it.
    pub(super) exposed: bool,
}

impl PasswordFile {
    /// The file at `path`.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Reads it. Blocks.
    pub(super) fn read(&self) -> Result<Contents, String> {
        let words = |error: std::io::Error| error.to_string();
        // Without blocking: a pipe in its place would otherwise be waited for.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&self.path).map_err(words)?;
        let about = file.metadata().map_err(words)?;
        if !about.is_file() {
            return Err("not a regular file".to_owned());
        }
        let password = as_password(read_some(file).map_err(words)?)?;
        Ok(Contents { password, exposed: about.mode() & 0o007 != 0 })
    }

    /// The password in it. Blocks.
    ///
    /// # Errors
    ///
    /// What is wrong with it, in words.
    pub fn fetch(&self) -> Result<Vec<u8>, String> {
        let contents = self.read().map_err(|error| format!("password_file {}: {error}", self.path))?;
        Ok(contents.password)
    }
}

fn read_some(file: File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(PASSWORD_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_that_is_none_is_told_at_once() {
        let folder = std::env::temp_dir().join(format!("pgweir-password-file-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("secret");
        let file = PasswordFile::new(path.to_str().unwrap());
        assert!(file.fetch().unwrap_err().contains("No such file"), "{:?}", file.fetch());
        std::fs::write(&path, "hush\n").unwrap();
        for (mode, exposed) in [(0o600, false), (0o640, false), (0o644, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(file.read().map(|read| read.exposed), Ok(exposed), "{mode:o}");
        }
        assert_eq!(file.fetch().unwrap(), b"hush");
        std::fs::remove_file(&path).unwrap();
        let pipe = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(pipe.success());
        assert!(file.fetch().unwrap_err().contains("not a regular file"));
        assert!(PasswordFile::new("/").fetch().unwrap_err().contains("not a regular file"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
