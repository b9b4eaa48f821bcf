use std::fmt;
use std::sync::Arc;

/// Where a value came from. The order is the order of precedence: the later wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody set it.
    #[default]
    Default,
    /// Nobody set it, and `pgweir exec` has a default of its own.
    Exec,
    /// A line of the configuration file.
    File {
        /// The file's path as it was given.
        path: Arc<str>,
        /// Counted from 1.
        line: usize,
    },
    /// A file as a whole.
    Path {
        /// Its path as it was given.
        path: Arc<str>,
    },
    /// An environment variable.
    Env {
        /// The whole name, `PGWEIR_` included.
        name: Arc<str>,
    },
    /// A flag of the command line.
    Flag {
        /// As it was typed, the two dashes included.
        name: Arc<str>,
    },
}

impl Origin {
    /// Whether both belong to the same layer, so that neither outranks the other.
    pub(crate) fn same_layer(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Exec => f.write_str("default of exec"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Path { path } => f.write_str(path),
            Self::Env { name } | Self::Flag { name } => f.write_str(name),
        }
    }
}
