//! The defaults that differ under `pgweir exec`: one application beside it, a platform around it that kills in time.

use crate::config::Config;
use crate::origin::Origin;
use crate::settings;
use crate::typed::Raw;

/// A default of `pgweir exec` that differs from that of `pgweir serve`.
pub struct Preset {
    /// The setting.
    pub key: &'static str,
    /// Its default, as text.
    pub value: &'static str,
    /// Why it differs.
    pub reason: &'static str,
    /// It differs only on a Heroku dyno.
    pub on_dyno: bool,
}

const fn preset(key: &'static str, value: &'static str, reason: &'static str) -> Preset {
    Preset { key, value, reason, on_dyno: false }
}

/// Every one of them, in the order of the documentation; the README's table is these rows.
pub static EXEC: &[Preset] = &[
    preset("listen_port", "0", "any free one: several wrappers may run side by side"),
    preset("tcp_keepidle", "10s", "a server that is gone is noticed within 30 s"),
    preset("tcp_keepintvl", "5s", "the same"),
    preset("tcp_keepcnt", "4", "the same"),
    preset("server_ack_timeout", "25s", "the same, of one that is gone with bytes on their way to it"),
    Preset {
        key: "server_tls_sslmode",
        value: "require",
        reason: "on a Heroku dyno (DYNO is set), for servers on other machines; else prefer",
        on_dyno: true,
    },
    preset("fleet_budget", "true", "dynos and containers share the server's limits, and deploys double them"),
    preset("query_wait_timeout", "20s", "less than the 30 s after which Heroku's router gives up"),
    preset("server_idle_timeout", "60s", "dynos are many, and the server's connections few"),
    preset("server_connect_timeout", "5s", "so that a second try fits into query_wait_timeout"),
    preset(
        "http_listen",
        "",
        "give one to have the dashboard, /limits, /metrics and the like; pgweir status needs none",
    ),
    preset("log_connections", "false", "an application without a pool of its own logs in all the time"),
    preset("log_disconnections", "false", "the same"),
];

/// The configuration that `pgweir exec` begins with: its own defaults, and no databases yet. `on_dyno`: on a Heroku dyno.
#[must_use]
pub fn exec_base(on_dyno: bool) -> Config {
    let mut config = Config::default();
    for preset in EXEC.iter().filter(|preset| on_dyno || !preset.on_dyno) {
        let Some(setting) = settings::find(preset.key) else { continue };
        if (setting.read)(&mut config, &Raw::Word(preset.value)).is_ok() {
            config.origins.insert(preset.key.to_owned(), Origin::Exec);
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_of_exec_is_a_settings_and_differs_from_serves() {
        let (base, plain) = (exec_base(true), Config::default());
        for preset in EXEC {
            let setting = settings::find(preset.key);
            let shown = setting.map(|setting| (setting.show(&base), setting.show(&plain)));
            let (own, serves) = shown.unwrap_or_default();
            assert_eq!(own, preset.value, "{}", preset.key);
            assert_ne!(own, serves, "{}", preset.key);
        }
        assert_eq!(exec_base(true).changes(&exec_base(false)).count(), 1);
    }
}
