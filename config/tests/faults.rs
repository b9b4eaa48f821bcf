//! Every class of fault, one row a case: what is written, and the line that answers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on should stop")]
#![allow(clippy::too_many_lines, reason = "tables are long; a test has few branches")]

use pgweir_config::{Config, Sources};

/// A database and a user, so that their absence is no further fault.
const BASE: &str = "[databases.app]\n[users.app]\npassword = \"x\"\n";

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn pairs(env: &[(&str, &str)]) -> Vec<(String, String)> {
    env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn faults(text: &str, env: &[(&str, &str)], args: &[&str]) -> Vec<String> {
    let (env, args) = (pairs(env), strings(args));
    let sources = Sources { file: Some(("f.toml", text)), env: &env, args: &args };
    match Config::from_sources(sources) {
        Ok(_) => Vec::new(),
        Err(faults) => faults.to_string().lines().map(str::to_owned).collect(),
    }
}

#[test]
#[allow(clippy::too_many_lines, reason = "a long table")]
fn every_fault_of_a_file_says_what_where_and_how_to_mend_it() {
    #[rustfmt::skip]
    let table: &[(&str, &str, &str)] = &[
        ("nothing wrong", "[pool]\ndefault_pool_size = 5", ""),
        ("outside the range", "[pool]\ndefault_pool_size = 0",
         "default_pool_size = 0: outside 1..=10000 (from f.toml:5). Write a value of 1..=10000."),
        ("negative", "[pool]\ndefault_pool_size = -1",
         "default_pool_size = -1: outside 1..=10000 (from f.toml:5). Write a value of 1..=10000."),
        ("a port above 65535", "[listen]\nlisten_port = 65536",
         "listen_port = 65536: outside 0..=65535 (from f.toml:5). Write a value of 0..=65535."),
        ("beyond 64 bits", "[pool]\ndefault_pool_size = 99999999999999999999999",
         "default_pool_size = 99999999999999999999999: outside 1..=10000 (from f.toml:5). Write a value of 1..=10000."),
        ("a quoted number", "[pool]\ndefault_pool_size = \"5\"",
         "default_pool_size = \"5\": a string, where a whole number is wanted (from f.toml:5). Write it in digits, without quotes or a unit."),
        ("a quoted boolean", "[log]\nlog_connections = \"true\"",
         "log_connections = \"true\": a string, where true or false is wanted (from f.toml:5). Write true or false, without quotes in a file."),
        ("a wrong unit", "[pool]\nquery_wait_timeout = \"2m\"",
         "query_wait_timeout = \"2m\": a string, where a time is wanted (from f.toml:5). Write seconds, or a text with ms, s, min, h or d such as \"250ms\"."),
        ("too long a time", "[pool]\nquery_wait_timeout = \"366d\"",
         "query_wait_timeout = \"366d\": outside 0..=365d (from f.toml:5). Write a value of 0..=365d."),
        ("an infinite time", "[pool]\nquery_wait_timeout = inf",
         "query_wait_timeout = inf: outside 0..=365d (from f.toml:5). Write a value of 0..=365d."),
        ("a decimal size", "[client]\ninspect_max = \"64kB\"",
         "inspect_max = \"64kB\": a string, where a size is wanted (from f.toml:5). Write bytes, or a text with B, KiB, MiB or GiB such as \"64KiB\"."),
        ("too small a message", "[client]\nmax_packet_size = 100",
         "max_packet_size = 100: outside 8192..=2147483647 (from f.toml:5). Write a value of 8192..=2147483647."),
        ("a text that is a number", "[pool]\nserver_reset_query = 5",
         "server_reset_query = 5: an integer, where a text is wanted (from f.toml:5). Write it in double quotes."),
        ("a list", "[listen]\nlisten_addr = [\"127.0.0.1\"]",
         "listen_addr: a list, where a text is wanted (from f.toml:5). Write it in double quotes."),
        ("an unknown word", "[pool]\npool_mode = \"transactions\"",
         "pool_mode = \"transactions\": none of session, transaction, statement (from f.toml:5). Write one of these."),
        ("a word in capitals", "[log]\nlog_level = \"INFO\"",
         "log_level = \"INFO\": none of error, warn, info, debug, trace (from f.toml:5). Write one of these."),
        ("half a second for the kernel", "[listen]\ntcp_keepidle = 0.5",
         "tcp_keepidle = 0.5: not in whole seconds, which is all the kernel counts (from f.toml:5). Round it, such as \"30s\"."),
        ("a NUL", "[pool]\nserver_reset_query = \"a\\u0000b\"",
         "server_reset_query = \"a\\u{0}b\": the text contains a NUL (from f.toml:5). Remove the NUL."),
        ("no address", "[listen]\nlisten_addr = \"\"",
         "listen_addr = : nothing to listen on, since unix_socket_dir is empty, too (from f.toml:5). Set listen_addr, unix_socket_dir or both."),
        ("sockets without a number", "[listen]\nlisten_addr = \"\"\nlisten_port = 0\nunix_socket_dir = \"/tmp\"",
         "listen_port = 0: no port that could name the sockets of unix_socket_dir, since listen_addr is empty (from f.toml:6). Set listen_port."),
        ("a relative directory", "[listen]\nunix_socket_dir = \"tmp\"",
         "unix_socket_dir = \"tmp\": not a list of absolute directories or @names separated by commas, nor empty (from f.toml:5). Mend the address."),
        ("too long a path", "[listen]\nunix_socket_dir = \"/aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeeffffffffffgggggggggghhhhhhhhhhiiiiiiiiiijjj\"",
         "unix_socket_dir = /aaaaaaaaaabbbbbbbbbbccccccccccddddddddddeeeeeeeeeefffffffff...: the path of the socket, with /.s.PGSQL.PORT, has 108 bytes, and the system takes at most 107 (from f.toml:5). Use a directory with a shorter name."),
        ("no octal digits", "[listen]\nunix_socket_mode = \"0789\"",
         "unix_socket_mode = \"0789\": no permissions in octal (from f.toml:5). Write three or four octal digits such as \"0770\"."),
        ("a proxy that is nobody", "[listen]\nproxy_protocol = true",
         "proxy_protocol = true: no network is named by proxy_protocol_from, so that no client could connect by TCP (from f.toml:5). Set proxy_protocol_from to the proxy's address or network, such as \"10.0.0.0/8\"."),
        ("no network", "[listen]\nproxy_protocol_from = \"10.0.0.1/8\"",
         "proxy_protocol_from = \"10.0.0.1/8\": not a list of networks such as 10.0.0.0/8 or 2001:db8::/32 separated by commas, nor empty (from f.toml:5). Mend the address."),
        ("peers without a socket", "[auth]\nauth_type = \"peer\"",
         "auth_type = peer: there is no Unix-domain socket whose other end the system could name, since unix_socket_dir is empty (from f.toml:5). Set unix_socket_dir, or choose another auth_type."),
        ("certificates that nobody shows", "[auth]\nauth_type = \"cert\"\n[users.b]\npassword = \"x\"",
         "auth_type = cert: clients show certificates in verify-ca and verify-full alone, and client_tls_sslmode = disable (from f.toml:5). Set client_tls_sslmode = \"verify-full\", or choose another auth_type."),
        ("certificates for nobody, over sockets", "[auth]\nauth_type = \"cert\"\n[listen]\nlisten_addr = \"\"\nunix_socket_dir = \"/tmp\"\n[tls]\nclient_tls_sslmode = \"verify-ca\"\nclient_tls_cert_file = \"c\"\nclient_tls_key_file = \"k\"\nclient_tls_ca_file = \"a\"",
         "auth_type = cert: there is no TLS on Unix-domain sockets, and listen_addr is empty (from f.toml:5). Set listen_addr, or choose another auth_type."),
        ("all addresses and one more", "[listen]\nlisten_addr = \"*, ::1\"",
         "listen_addr = \"*, ::1\": not a list of IPs and names separated by commas, nor * alone (from f.toml:5). Mend the address."),
        ("an address twice", "[listen]\nlisten_addr = \"::1, ::1\"",
         "listen_addr = \"::1, ::1\": given twice (from f.toml:5). Keep one of the two."),
        ("no HTTP port", "[http]\nhttp_listen = \"localhost\"",
         "http_listen = \"localhost\": not host:port such as 127.0.0.1:9127, nor empty (from f.toml:5). Mend the address."),
        ("HTTP for everybody", "[http]\nhttp_listen = \"0.0.0.0:9127\"",
         "http_listen = 0.0.0.0:9127: not a loopback address, and http_token is empty, so that everybody who reaches it could look (from f.toml:5). Set http_token, or listen on 127.0.0.1."),
        ("HTTP by a name that may be anybody's", "[http]\nhttp_listen = \"db.internal:9127\"",
         "http_listen = db.internal:9127: not a loopback address, and http_token is empty, so that everybody who reaches it could look (from f.toml:5). Set http_token, or listen on 127.0.0.1."),
        ("HTTP on loopback", "[http]\nhttp_listen = \"[::1]:9127\"", ""),
        ("HTTP with a token", "[http]\nhttp_listen = \"0.0.0.0:9127\"\nhttp_token = \"0123456789abcdef\"", ""),
        ("a token that is guessed", "[http]\nhttp_listen = \"0.0.0.0:9127\"\nhttp_token = \"secret\"",
         "http_token: not a token of 16 or more printable ASCII characters without blanks (from f.toml:6). Take a random one, such as the output of openssl rand -hex 24."),
        ("a bare IPv6 address", "[http]\nhttp_listen = \"::1:9127\"",
         "http_listen = \"::1:9127\": not host:port such as 127.0.0.1:9127, nor empty (from f.toml:5). Mend the address."),
        ("an unknown key", "[pool]\ndefaultpool_size = 5",
         "defaultpool_size: there is no such setting (from f.toml:5). The nearest name is default_pool_size."),
        ("a key of another group", "[pool]\nmax_client_conn = 5",
         "max_client_conn: it stands under the wrong table (from f.toml:5). Move it under [client]."),
        ("an unknown group", "[pools]\nx = 1",
         "[pools]: there is no such group (from f.toml:4). The nearest name is pool."),
        ("an unknown key of a database", "[databases.b]\npoolsize = 5",
         "databases.b.poolsize: there is no such key of a database (from f.toml:5). The nearest name is pool_size."),
        ("an unknown key of a user", "[users.b]\npasword = \"hush\"\npassword = \"x\"",
         "users.b.pasword: there is no such key of a user (from f.toml:5). The nearest name is password."),
        ("a value of a database", "[databases.b]\nport = 0",
         "databases.b.port = 0: outside 1..=65535 (from f.toml:5). Write a value of 1..=65535."),
        ("a relative socket directory", "[databases.b]\nhost = \"tmp/x\"",
         "databases.b.host = \"tmp/x\": not one host name, IP address or absolute directory of a socket (from f.toml:5). Mend the address."),
        ("a database that is a number", "[databases]\nb = 5",
         "databases.b: an integer, where a table is wanted (from f.toml:5). Write a [table] header and the keys below it."),
        ("a user that is a text", "[users]\nb = \"hush\"",
         "users.b: a string, where a table is wanted (from f.toml:5). Write a [table] header and the keys below it."),
        ("a secret of another type is not shown", "[users.b]\npassword = 12345",
         "users.b.password: an integer, where a text is wanted (from f.toml:5). Write it in double quotes."),
        ("the console's name", "[databases.pgbouncer]",
         "databases.pgbouncer: the name belongs to the admin console (from f.toml:4). Choose another name and give the server's in dbname."),
        ("an empty name", "[databases.\"\"]",
         "databases.: the name is empty (from f.toml:4). Give the entry a name."),
        ("a bad port in a URL", "[databases]\nb = \"postgres://u:hush@h:99999/d\"",
         "databases.b: the port of the URL is not 1..=65535 (from f.toml:5). Write the port in digits; if the password holds @, /, ? or #, percent-encode them (%40, %2F, %3F, %23)."),
        ("no URL", "[databases]\nb = \"h:5432\"",
         "databases.b: not a Postgres URL (from f.toml:5). Write postgres://user:password@host:port/dbname."),
        ("a value in a URL's query", "[databases]\nb = \"postgres://h/d?pool_size=0\"",
         "databases.b.pool_size = 0: outside 1..=10000 (from f.toml:5). Write a value of 1..=10000."),
        ("a key twice in a URL's query", "[databases]\nb = \"postgres://h/d?pool_size=1&pool_size=2\"",
         "databases.b.pool_size: given twice (from f.toml:5). Keep one of the two."),
        ("a key twice", "[pool]\nmin_pool_size = 1\nmin_pool_size = 1",
         "file: not TOML: duplicate key (from f.toml:6). Mend that line; https://toml.io explains the format."),
        ("min above the default size", "[pool]\ndefault_pool_size = 5\nmin_pool_size = 6",
         "min_pool_size = 6: above default_pool_size = 5, so that it can never be met (from f.toml:6). Lower it, or raise default_pool_size."),
        ("min above a database's size", "[pool]\nmin_pool_size = 6\n[databases.b]\npool_size = 5",
         "min_pool_size = 6: above databases.b.pool_size = 5, so that it can never be met (from f.toml:5). Lower it, or raise databases.b.pool_size."),
        ("a database's min above the size", "[databases.b]\nmin_pool_size = 21",
         "databases.b.min_pool_size = 21: above default_pool_size = 20, so that it can never be met (from f.toml:5). Lower it, or raise default_pool_size."),
        ("min above a user's size", "[pool]\nmin_pool_size = 6\n[users.b]\npassword = \"x\"\npool_size = 5",
         "min_pool_size = 6: above users.b.pool_size = 5, so that it can never be met (from f.toml:5). Lower it, or raise users.b.pool_size."),
        ("a user without a password", "[users.b]\npool_size = 5",
         "users.b.password: the user has no password, so that auth_type scram-sha-256 refuses every login (from f.toml:4). Add password = \"...\"."),
        ("a user without a password, and a file", "[auth]\nauth_file = \"users.txt\"\n[users.b]\npool_size = 5", ""),
        ("an MD5 hash where MD5 is asked for", "[auth]\nauth_type = \"md5\"\n[users.b]\npassword = \"md55d41402abc4b2a76b9719d911017c592\"", ""),
        ("anyone, and nobody to stand for", "[auth]\nauth_type = \"any\"",
         "databases.app.user: absent, and auth_type any takes no one's word for who he is (from f.toml:1). Name the user of its server connections."),
        ("a map without a file", "[auth]\nauth_ident_map = \"m\"",
         "auth_ident_map = m: auth_ident_file is empty (from f.toml:5). Set both, or neither."),
        ("users looked up nowhere", "[auth]\nauth_dbname = \"b\"",
         "auth_dbname = b: no such database is configured (from f.toml:5). Name one of [databases.NAME]."),
        ("a user without a password, looked up", "[auth]\nauth_user = \"c\"\n[users.b]\npool_size = 5", ""),
        ("half a verifier", "[users.b]\npassword = \"SCRAM-SHA-256$4096:AAAA$hush\"",
         "users.b.password: a SCRAM-SHA-256 verifier that is not <iterations>:<salt>$<StoredKey>:<ServerKey> (from f.toml:5). Copy it whole from pg_authid.rolpassword, or write the plain password."),
        ("two passwords", "[databases.b]\npassword = \"x\"\npassword_file = \"/f\"",
         "databases.b.password_file: databases.b.password is given, too (from f.toml:6). Keep one of password, password_file and password_command."),
        ("two more passwords", "[databases.b]\npassword_command = \"x\"\npassword_file = \"/f\"",
         "databases.b.password_command: databases.b.password_file is given, too (from f.toml:5). Keep one of password, password_file and password_command."),
        ("an unknown method", "[databases.b]\nrequire_auth = \"scram\"",
         "databases.b.require_auth = \"scram\": none of none, password, md5, scram-sha-256, nor these with ! in front (from f.toml:5). Write methods separated by commas, such as \"scram-sha-256\" or \"!password,!md5\"."),
        ("mixed methods", "[server]\nserver_require_auth = \"md5,!none\"",
         "server_require_auth = \"md5,!none\": some methods with ! in front and some without (from f.toml:5). Name either those that are allowed, or, with !, those that are not."),
        ("an open quote", "[databases.b]\npassword_command = \"a 'b\"",
         "databases.b.password_command = \"a 'b\": a quote or a backslash at its end is left open (from f.toml:5). Close it, or put a backslash in front of it."),
        ("no program", "[databases.b]\npassword_command = \" \"",
         "databases.b.password_command = \" \": there is no program in it (from f.toml:5). Write a program and its arguments."),
        ("an MD5 hash", "[users.b]\npassword = \"md5aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"",
         "users.b.password: an MD5 hash, which SCRAM cannot check (from f.toml:5). Write the plain password or a SCRAM-SHA-256 verifier."),
    ];
    for (name, text, want) in table {
        let got = faults(&format!("{BASE}{text}"), &[], &[]).join("\n");
        assert_eq!(got, *want, "{name}");
    }
}

#[test]
fn keys_outside_any_table_are_told_where_they_belong() {
    #[rustfmt::skip]
    let table = [
        ("default_pool_size = 5", "default_pool_size: it stands under the wrong table (from f.toml:1). Move it under [pool]."),
        ("default_pool = 5",      "default_pool: there is no such setting (from f.toml:1). The nearest name is default_pool_size."),
        ("pool = 5",              "pool: an integer, where a table is wanted (from f.toml:1). Write a [table] header and the keys below it."),
    ];
    for (text, want) in table {
        assert_eq!(faults(&format!("{text}\n{BASE}"), &[], &[]), [want]);
    }
}

#[test]
fn every_fault_of_the_environment_names_its_variable() {
    #[rustfmt::skip]
    let table: &[(&str, (&str, &str), &str)] = &[
        ("nothing wrong", ("PGWEIR_DEFAULT_POOL_SIZE", "5"), ""),
        ("not ours", ("HOME", "/"), ""),
        ("a service's host", ("PGWEIR_SERVICE_HOST", "10.0.0.1"), ""),
        ("a service's port", ("PGWEIR_PORT", "tcp://10.0.0.1:6432"), ""),
        ("a service's numbered port", ("PGWEIR_PORT_6432_TCP_ADDR", "10.0.0.1"), ""),
        ("not a number", ("PGWEIR_DEFAULT_POOL_SIZE", "many"),
         "default_pool_size = many: a word, where a whole number is wanted (from PGWEIR_DEFAULT_POOL_SIZE). Write it in digits, without quotes or a unit."),
        ("empty", ("PGWEIR_DEFAULT_POOL_SIZE", ""),
         "default_pool_size = : a word, where a whole number is wanted (from PGWEIR_DEFAULT_POOL_SIZE). Write it in digits, without quotes or a unit."),
        ("neither true nor false", ("PGWEIR_LOG_CONNECTIONS", "maybe"),
         "log_connections = maybe: a word, where true or false is wanted (from PGWEIR_LOG_CONNECTIONS). Write true or false, without quotes in a file."),
        ("unknown", ("PGWEIR_POOL_SIZE", "hush"),
         "PGWEIR_POOL_SIZE: there is no such setting (from PGWEIR_POOL_SIZE). The nearest name is PGWEIR_MIN_POOL_SIZE."),
        ("a port that is no service's", ("PGWEIR_PORT", "6432"),
         "PGWEIR_PORT: there is no such setting (from PGWEIR_PORT). The nearest name is PGWEIR_LISTEN_PORT."),
        ("not UTF-8", ("PGWEIR_USERS", "a=hu\u{fffd}sh"),
         "PGWEIR_USERS: the value is not UTF-8 (from PGWEIR_USERS). Set it in UTF-8; in a URL, percent-encode what is not ASCII."),
        ("lower case", ("PGWEIR_pool_mode", "session"),
         "PGWEIR_pool_mode: there is no such setting (from PGWEIR_pool_mode). The nearest name is PGWEIR_POOL_MODE."),
        ("a database without its name", ("PGWEIR_DATABASES", "b=postgres://h/d hush"),
         "databases, word 2: no = between a name and its value (from PGWEIR_DATABASES). Write NAME=VALUE."),
        ("a database twice", ("PGWEIR_DATABASES", "b=postgres://h/d b=postgres://h/d"),
         "databases.b: given twice (from PGWEIR_DATABASES). Keep one of the two."),
        ("a user without a name", ("PGWEIR_USERS", "=hush"),
         "users.: the name is empty (from PGWEIR_USERS). Give the entry a name."),
    ];
    for (name, variable, want) in table {
        assert_eq!(faults(BASE, &[*variable], &[]).join("\n"), *want, "{name}");
    }
}

#[test]
fn every_fault_of_the_command_line_names_its_flag() {
    #[rustfmt::skip]
    let table: &[(&str, &[&str], &str)] = &[
        ("dashes and a space", &["--default-pool-size", "5"], ""),
        ("underscores and =", &["--default_pool_size=5"], ""),
        ("a negative number after a space", &["--default-pool-size", "-1"],
         "default_pool_size = -1: outside 1..=10000 (from --default-pool-size). Write a value of 1..=10000."),
        ("no value at the end", &["--default-pool-size"],
         "--default-pool-size: the flag has no value (from --default-pool-size). Write --key=value or --key value."),
        ("no value before a flag", &["--default-pool-size", "--min-pool-size=1"],
         "--default-pool-size: the flag has no value (from --default-pool-size). Write --key=value or --key value."),
        ("twice in two spellings", &["--min-pool-size=1", "--min_pool_size=2"],
         "min_pool_size: given twice (from --min_pool_size). Keep one of the two."),
        ("unknown", &["--default-poolsize=hush"],
         "--default-poolsize: there is no such setting (from --default-poolsize). The nearest name is --default-pool-size."),
        ("unknown, without a value", &["--databse"],
         "--databse: there is no such setting (from --databse). The nearest name is --database."),
        ("not a flag", &["--min-pool-size=1", "hush"],
         "argument 2: not a flag (from the command line). Write --key=value or --key value, or remove the word."),
        ("one dash", &["-d"],
         "argument 1: not a flag (from the command line). Write --key=value or --key value, or remove the word."),
        ("two dashes alone", &["--"],
         "argument 1: not a flag (from the command line). Write --key=value or --key value, or remove the word."),
        ("two files", &["--config=a", "--config=b"],
         "--config: given twice (from --config). Keep one of the two."),
        ("a database without its name", &["--database", "postgres://h/d"],
         "--database: no = between a name and its value (from --database). Write NAME=VALUE."),
        ("a database twice", &["--database=b=postgres://h/d", "--database=b=postgres://h/d"],
         "databases.b: given twice (from --database). Keep one of the two."),
        ("a broken URL", &["--database", "b=postgres://u:hu/sh@h/d"],
         "databases.b: the port of the URL is not 1..=65535 (from --database). Write the port in digits; if the password holds @, /, ? or #, percent-encode them (%40, %2F, %3F, %23).\n\
          databases.b: the URL has a bare @, / or # where none may stand (from --database). Percent-encode them: %40, %2F, %23."),
    ];
    for (name, args, want) in table {
        assert_eq!(faults(BASE, &[], args).join("\n"), *want, "{name}");
    }
}

#[test]
fn what_is_missing_everywhere_is_told_without_a_place() {
    let want = [
        "databases: there is no database. Add [databases.app] with host = \"...\" to the file, or pass --database app=postgres://user:password@host/dbname.",
        "auth_type = scram-sha-256: no user has a password, so that no client could log in (the default). Add [users.NAME] with password = \"...\", or name an auth_file, or set auth_type = \"trust\" if everyone who reaches the port may log in.",
    ];
    assert_eq!(faults("", &[], &[]), want);
    assert_eq!(faults("", &[], &["--auth-type=trust", "--database=app=postgres://h"]), [""; 0]);
    let tls =
        ["sslmode=verify-full", "ca-file=a", "cert-file=c", "key-file=k"].map(|word| format!("--client-tls-{word}"));
    let mut args = vec!["--auth-type=cert", "--database=app=postgres://h"];
    args.extend(tls.iter().map(String::as_str));
    let want = "auth_type = cert: no user is configured, so that no client could log in (from --auth-type). Add [users.NAME], or name an auth_file, or set auth_user.";
    assert_eq!(faults("", &[], &args), [want]);
}

#[test]
fn all_faults_of_all_layers_come_at_once_in_the_order_of_the_layers() {
    let text = "[pool]\npool_mode = \"x\"\nmin_pool_size = 0.5\n[log]\nlog_leve = \"info\"\n[databases.app]\n[users.app]\npassword = \"x\"\n";
    let got = faults(text, &[("PGWEIR_LISTEN_PORT", "x"), ("PGWEIR_NOPE", "1")], &["--stats-period=0", "word"]);
    let places: Vec<_> = got.iter().map(|line| line.split(" (from ").nth(1).unwrap_or_default()).collect();
    let want = [
        "f.toml:2)",
        "f.toml:3)",
        "f.toml:5)",
        "PGWEIR_LISTEN_PORT)",
        "PGWEIR_NOPE)",
        "--stats-period)",
        "the command line)",
    ];
    assert_eq!(places.len(), want.len(), "{got:#?}");
    for (place, want) in places.iter().zip(want) {
        assert!(place.starts_with(want), "{place} is not at {want}");
    }
}

#[test]
fn one_fault_does_not_bring_another_with_it() {
    #[rustfmt::skip]
    let table = [
        ("the only database is broken",  "[databases]\nb = 5\n[users.a]\npassword = \"x\""),
        ("the only user is broken",      "[databases.b]\n[users]\na = 5"),
        ("the only password is broken",  "[databases.b]\n[users.a]\npassword = 5"),
        ("the auth_type is broken",      "[databases.b]\n[auth]\nauth_type = \"trus\""),
        ("the pool size is broken",      "[pool]\nmin_pool_size = 30\ndefault_pool_size = \"x\"\n[databases.b]\n[users.a]\npassword = \"x\""),
        ("the file is cut",              "[databas"),
    ];
    for (name, text) in table {
        let got = faults(text, &[], &[]);
        assert_eq!(got.len(), 1, "{name}: {got:#?}");
    }
}

#[test]
fn no_fault_shows_a_secret_and_each_is_one_line() {
    #[rustfmt::skip]
    let table: [(&str, &str); 12] = [
        ("type",            "[users.a]\npassword = [\"hush\"]"),
        ("misspelled key",  "[users.a]\npasswort = \"hush\""),
        ("misplaced key",   "password = \"hush\""),
        ("port",            "[databases]\na = \"postgres://u:hush/x@h/d\""),
        ("at",              "[databases]\na = \"postgres://u:12@hush@h/d\""),
        ("question mark",   "[databases]\na = \"postgres://u:12?hush@h/d\""),
        ("hash",            "[databases]\na = \"postgres://u:12#hush@h/d\""),
        ("percent",         "[databases]\na = \"postgres://u:%hush@h/d\""),
        ("scheme",          "[databases]\na = \"mysql://u:hush@h/d\""),
        ("syntax",          "[databases.a]\npassword = \"hush"),
        ("syntax, no quote", "[databases.a]\npassword = hush"),
        ("multi-line key",  "\"a\\nb\\u2028c\" = 1"),
    ];
    for (name, text) in table {
        let (env, args) = (Vec::new(), Vec::new());
        let sources = Sources { file: Some(("f.toml", text)), env: &env, args: &args };
        let Err(faults) = Config::from_sources(sources) else { panic!("{name}: no fault") };
        let shown = faults.to_string();
        assert!(!shown.contains("hush"), "{name}: {shown}");
        assert!(!format!("{faults:?}").contains("hush"), "{name}: {faults:?}");
        assert_eq!(shown.lines().count(), faults.0.len(), "{name}: {shown}");
        assert!(!shown.contains('\u{2028}'), "{name}: {shown}");
    }
    let shown =
        faults("", &[("PGWEIR_USERS", "a b=hush hush")], &["--user", "hush", "hush", "--usr", "a=hush"]).join("\n");
    assert!(!shown.contains("hush"), "{shown}");
}

#[test]
fn a_file_that_cannot_be_read_is_a_fault_beside_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let load = |name: &str| {
        let args = strings(&["--config", &path(name), "--listen-port=x"]);
        match Config::load(&args, &[]) {
            Ok(_) => Vec::new(),
            Err(faults) => faults.to_string().lines().map(str::to_owned).collect(),
        }
    };
    std::fs::write(path("latin1"), b"# one\n[pool]\n# \xe4\n").unwrap();
    #[rustfmt::skip]
    let table = [
        ("missing", "the file cannot be read: No such file or directory (os error 2) (from --config)"),
        (".",       "the file cannot be read: Is a directory (os error 21) (from --config)"),
        ("latin1",  "the line is not UTF-8 (from "),
    ];
    for (name, want) in table {
        let got = load(name);
        assert_eq!(got.len(), 2, "{name}: {got:#?}");
        assert!(got.iter().any(|line| line.contains(want)), "{name}: {got:#?}");
    }
    assert!(load("latin1").concat().contains("latin1:3)"));
}
