//! No input, however odd, makes the parser panic, show a secret, or break a line.

use pgweir_config::{Config, Faults, Kind, Setting, Sources, settings};
use proptest::prelude::*;

fn check(result: Result<Config, Faults>) -> Result<(), TestCaseError> {
    match result {
        Ok(config) => {
            prop_assert!(!config.databases.is_empty());
            prop_assert!(config.pool.min_pool_size <= config.pool.default_pool_size);
        }
        Err(faults) => {
            prop_assert!(!faults.0.is_empty());
            prop_assert_eq!(faults.to_string().lines().count(), faults.0.len());
        }
    }
    Ok(())
}

/// A key, real more often than not.
fn key() -> impl Strategy<Value = String> {
    let names: Vec<String> = settings::all().map(|setting| setting.name.to_owned()).collect();
    prop_oneof![
        4 => proptest::sample::select(names),
        1 => "[a-z_.\"*]{0,12}",
        1 => proptest::sample::select(vec!["host", "port", "password", "pool_size"]).prop_map(str::to_owned),
    ]
}

/// A value, in the neighbourhood of what is allowed.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        "-?[0-9]{1,45}",
        "-?[0-9]{0,4}\\.[0-9]{0,4}(e[0-9]{1,3})?",
        "\"[0-9.]{0,5} ?(ms|s|min|h|d|KiB|MiB|GiB|B|m)?\"",
        "\"postgres(ql)?://[a-z:@/?#%\\[\\]0-9=&.,]{0,30}\"",
        "\"[a-z:,*.\\[\\]0-9]{0,20}\"",
        Just("true".to_owned()),
        Just("[1, {a = 2}]".to_owned()),
        Just("1979-05-27".to_owned()),
        Just("nan".to_owned()),
        any::<String>(),
    ]
}

/// The settings that are numbers, sizes or times.
fn measured() -> impl Iterator<Item = &'static Setting<Config>> {
    settings::all().filter(|setting| matches!(setting.kind, Kind::Count | Kind::Bytes | Kind::Time))
}

fn header() -> impl Strategy<Value = String> {
    let groups =
        ["[pool]", "[client]", "[databases]", "[databases.app]", "[users.app]", "[[pool]]", "[databases.\"*\"]"];
    prop_oneof![4 => proptest::sample::select(groups.to_vec()).prop_map(str::to_owned), 1 => Just(String::new())]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn no_text_makes_the_file_parser_panic(text in any::<String>()) {
        check(Config::from_sources(Sources { file: Some(("f", &text)), ..Sources::default() }))?;
    }

    #[test]
    fn no_file_of_real_keys_and_odd_values_panics(
        lines in proptest::collection::vec((header(), key(), value()), 0..6),
    ) {
        let lines: Vec<_> = lines.iter().map(|(header, key, value)| format!("{header}\n{key} = {value}\n")).collect();
        let text = lines.concat();
        check(Config::from_sources(Sources { file: Some(("f", &text)), ..Sources::default() }))?;
    }

    #[test]
    fn no_environment_panics(
        pairs in proptest::collection::vec((prop_oneof![key(), Just("databases".to_owned()), any::<String>()], value()), 0..6),
    ) {
        let env: Vec<_> = pairs.into_iter().map(|(key, value)| (format!("PGWEIR_{}", key.to_uppercase()), value)).collect();
        check(Config::from_sources(Sources { env: &env, ..Sources::default() }))?;
    }

    #[test]
    fn no_command_line_panics(
        words in proptest::collection::vec(
            prop_oneof![
                (key(), value()).prop_map(|(key, value)| format!("--{key}={value}")),
                key().prop_map(|key| format!("--{key}")),
                value(),
                value().prop_map(|value| format!("--database=a={}", value.trim_matches('"'))),
            ],
            0..8,
        ),
    ) {
        check(Config::from_sources(Sources { args: &words, ..Sources::default() }))?;
    }

    #[test]
    fn what_a_setting_shows_sets_it_to_the_same(index in 0..measured().count(), count in 0_u64..3_000_000, unit in "(ms|s|min|KiB|MiB|)") {
        let Some(setting) = measured().nth(index) else { return Ok(()) };
        let build = |value: &str| {
            let args = [format!("--{}={value}", setting.name), "--auth-type=trust".to_owned(), "--database=a=postgres://h".to_owned()];
            Config::from_sources(Sources { args: &args, ..Sources::default() })
        };
        if let Ok(config) = build(&format!("{count}{unit}")) {
            prop_assert_eq!(build(&setting.show(&config)), Ok(config));
        }
    }
}
