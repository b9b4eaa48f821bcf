//! The buildpacks, run as a platform runs them, on folders of their own.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{both, clean, shipped, well, yaml};

/// A program that stands for a release: small, and the one under test all the same.
fn program() -> Vec<u8> {
    format!("#!/bin/sh\nexec {} \"$@\"\n", env!("CARGO_BIN_EXE_pgweir")).into_bytes()
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A server that gives everybody the program, and counts.
struct Release {
    url: String,
    asked: Arc<AtomicUsize>,
}

impl Release {
    /// Its thread ends with the process.
    fn publish(program: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/pgweir?token=a-token-of-the-release", listener.local_addr().unwrap());
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                count.fetch_add(1, Ordering::SeqCst);
                let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", program.len());
                stream.write_all(&[head.as_bytes(), &program].concat()).unwrap();
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// What a platform has of an app.
struct App {
    root: TempDir,
}

impl App {
    /// With these files.
    fn with(files: &[(&str, &str)]) -> Self {
        let app = Self { root: tempfile::tempdir().unwrap() };
        for folder in ["build", "cache", "env", "layers", "platform/env"] {
            fs::create_dir_all(app.path(folder)).unwrap();
        }
        for (name, text) in files {
            app.write(&format!("build/{name}"), text);
        }
        app
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A variable of the app, for either kind of build.
    fn set(&self, name: &str, value: &str) {
        self.write(&format!("env/{name}"), value);
        self.write(&format!("platform/env/{name}"), value);
    }

    /// The next build: a clean checkout, what is kept stays.
    fn checked_out_anew(&self, files: &[(&str, &str)]) {
        fs::remove_dir_all(self.path("build")).unwrap();
        fs::create_dir(self.path("build")).unwrap();
        for (name, text) in files {
            self.write(&format!("build/{name}"), text);
        }
    }

    /// The classic buildpack.
    fn compile(&self) -> Output {
        let mut compile = clean(shipped("buildpack/bin/compile"));
        compile.args([self.path("build"), self.path("cache"), self.path("env")]).output().unwrap()
    }

    /// The Cloud Native one.
    fn build(&self) -> Output {
        let mut build = clean(shipped("buildpack/bin/build"));
        build.args([self.path("layers"), self.path("platform"), self.path("plan.toml")]);
        build.current_dir(self.path("build")).output().unwrap()
    }

    /// A shell on the dyno, as its platform starts one.
    fn dyno(&self, script: &str) -> Command {
        let home = self.path("build");
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("for file in .profile.d/*.sh; do . \"$file\"; done; {script}")]);
        shell.env_clear().env("HOME", &home).env("PATH", "/usr/local/bin:/usr/bin:/bin").current_dir(home);
        shell
    }
}

#[track_caller]
fn done(output: &Output) -> String {
    let said = both(output);
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("a-token-of-the-release"), "{said}");
    said
}

#[track_caller]
fn refused(output: &Output, why: &str) {
    let said = both(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(why), "{said}");
    assert!(!said.contains("a-token-of-the-release"), "{said}");
}

const WEB: (&str, &str) = ("Procfile", "web: pgweir exec -- sh -c 'echo served'\n");

#[test]
fn the_buildpack_is_for_apps_that_ask_for_it() {
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)], bool); 8] = [
        ("nothing",                  &[],                                                     false),
        ("another app",              &[("Procfile", "web: puma\nworker: mypgweir exec\n")],   false),
        ("a mention",                &[("README.md", "pgweir exec")],                         false),
        ("in a shell's words",       &[("Procfile", "web: sh -c \"pgweir exec puma\"\n")],  true),
        ("a Procfile",               &[WEB],                                                  true),
        ("one for PgBouncer",        &[("Procfile", "web: bin/start-pgbouncer puma\n")],      true),
        ("the program",              &[("vendor/pgweir/pgweir", "")],                         true),
        ("a configuration",          &[("pgweir.toml", "")],                                  true),
    ];
    for (name, files, want) in table {
        let app = App::with(files);
        let detect = shipped("buildpack/bin/detect");
        let classic = clean(&detect).arg(app.path("build")).output().unwrap();
        assert_eq!(classic.status.code(), Some(i32::from(!want)), "{name}: {}", both(&classic));
        let plan = app.path("plan.toml");
        let mut native = clean(&detect);
        native.args([app.path("platform"), plan.clone()]).env("CNB_BUILD_PLAN_PATH", &plan);
        let native = native.current_dir(app.path("build")).output().unwrap();
        assert_eq!(native.status.code(), Some(if want { 0 } else { 100 }), "{name}: {}", both(&native));
        if want {
            let plan: toml::Table = fs::read_to_string(plan).unwrap().parse().unwrap();
            assert_eq!(plan["provides"][0]["name"], plan["requires"][0]["name"], "{plan}");
        }
    }
}

#[test]
fn an_app_is_compiled_again_and_again_with_one_download_and_its_dyno_runs_the_program() {
    let release = Release::publish(program());
    let procfile = [("Procfile", "web: bin/start-pgbouncer sh -c 'true'\n")];
    let app = App::with(&procfile);
    app.set("BP_PGWEIR_URL", &release.url);
    refused(&app.compile(), "BP_PGWEIR_URL needs BP_PGWEIR_SHA256");
    app.set("BP_PGWEIR_SHA256", &sum(b"another"));
    refused(&app.compile(), "another SHA-256");
    let before = release.asked();
    app.set("BP_PGWEIR_SHA256", &sum(&program()));
    for build in 1..=2 {
        app.checked_out_anew(&procfile);
        let said = done(&app.compile());
        assert!(said.contains(&format!("pgweir {}", env!("CARGO_PKG_VERSION"))), "{said}");
        assert_eq!(release.asked() - before, 1, "build {build}: {said}");
        // Both ways by which a Procfile may start it.
        for wrap in ["pgweir exec --", "bin/start-pgbouncer"] {
            let mut shell = app.dyno(&format!("{wrap} sh -c 'echo \"$DATABASE_URL\"; echo \"$PATH\"'"));
            let said = well(shell.env("DATABASE_URL", "postgres://u:not-a-secret@db.invalid/d").env("DYNO", "web.1"));
            let (url, path) = said.trim().split_once('\n').unwrap();
            assert!(url.starts_with("postgres://u:not-a-secret@127.0.0.1:"), "{wrap}: {said}");
            assert!(path.starts_with(app.path("build/.pgweir/bin").to_str().unwrap()), "{wrap}: {said}");
        }
    }
    // A cache that was tampered with is not believed.
    let kept = app.path(&format!("cache/pgweir/{}", sum(&program())));
    fs::write(&kept, "#!/bin/sh\necho owned\n").unwrap();
    done(&app.compile());
    assert_eq!(release.asked() - before, 2);
    assert_eq!(fs::read(kept).unwrap(), program());
    let release_phase = well(&mut clean(shipped("buildpack/bin/release")));
    assert_eq!(yaml(&release_phase), [serde_json::json!({})]);
}

#[test]
fn a_program_comes_from_the_app_or_its_source_and_without_any_the_build_says_what_to_do() {
    let app = App::with(&[WEB]);
    for output in [app.compile(), app.build()] {
        refused(
            &output,
            "Commit it as vendor/pgweir/pgweir, or set BP_PGWEIR_URL and BP_PGWEIR_SHA256, or BP_PGWEIR_SOURCE",
        );
    }
    // Committed.
    let program = String::from_utf8(program()).unwrap();
    app.write("build/vendor/pgweir/pgweir", &program);
    assert!(done(&app.compile()).contains("vendor/pgweir"));
    well(&mut app.dyno("pgweir --version"));
    // What the app has is left as it was: a shim of its own, say.
    assert!(!app.path("build/bin").exists());
    // One that cannot run here.
    app.write("build/vendor/pgweir/pgweir", "\u{7f}ELF of another machine");
    refused(&app.compile(), "does not run here");

    // By a cargo that notes what it is asked for.
    let app = App::with(&[WEB, ("third_party/pgweir/Cargo.toml", "")]);
    app.set("BP_PGWEIR_SOURCE", "third_party/pgweir");
    let cargo = "#!/bin/sh\nmkdir -p \"$CARGO_TARGET_DIR/release\"\necho \"$PWD $*\" >>\"$CARGO_TARGET_DIR/../asked\"\n\
                 cp \"$CARGO_TARGET_DIR/../program\" \"$CARGO_TARGET_DIR/release/pgweir\"\n";
    app.write("tools/cargo", cargo);
    fs::set_permissions(app.path("tools/cargo"), fs::Permissions::from_mode(0o755)).unwrap();
    app.write("cache/program", &program);
    let mut compile = clean(shipped("buildpack/bin/compile"));
    compile.args([app.path("build"), app.path("cache"), app.path("env")]);
    let path = format!("{}:/usr/bin:/bin", app.path("tools").display());
    done(&compile.env("PATH", &path).output().unwrap());
    let asked = fs::read_to_string(app.path("cache/asked")).unwrap();
    let want = "third_party/pgweir build --release --locked --no-default-features --features grammar\n";
    assert!(asked.ends_with(want), "{asked}");
    well(&mut app.dyno("pgweir --version"));
    // The real `strip` will not have a script. One that can: what it makes of cargo's program is shipped.
    let installed = app.path("build/.pgweir/bin/pgweir");
    assert_eq!(fs::read_to_string(&installed).unwrap(), program);
    app.write("tools/strip", "#!/bin/sh\n[ \"$1\" = -o ] && { cat \"$3\"; echo '# stripped'; } >\"$2\"\n");
    fs::set_permissions(app.path("tools/strip"), fs::Permissions::from_mode(0o755)).unwrap();
    done(&compile.output().unwrap());
    assert_eq!(fs::read_to_string(&installed).unwrap(), format!("{program}# stripped\n"));
    assert_eq!(fs::read_to_string(app.path("cache/pgweir-target/release/pgweir")).unwrap(), program);
    well(&mut app.dyno("pgweir --version"));
    // What cargo is asked for is there.
    let manifest: toml::Table =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap().parse().unwrap();
    assert!(manifest["features"].get("grammar").is_some());
}

#[test]
fn a_cloud_native_build_makes_a_layer_and_keeps_its_download() {
    let release = Release::publish(program());
    let app = App::with(&[("Procfile", "web: bin/start-pgbouncer sh -c 'true'\n")]);
    app.set("BP_PGWEIR_URL", &release.url);
    app.set("BP_PGWEIR_SHA256", &sum(&program()));
    for _ in 0..2 {
        done(&app.build());
        assert_eq!(release.asked(), 1);
        let layer = |name: &str| -> toml::Table { fs::read_to_string(app.path(name)).unwrap().parse().unwrap() };
        let types = |name: &str, key: &str| layer(name)["types"].get(key).and_then(toml::Value::as_bool) == Some(true);
        assert!(types("layers/pgweir.toml", "launch") && !types("layers/pgweir.toml", "cache"));
        assert!(types("layers/cache.toml", "cache") && !types("layers/cache.toml", "launch"));
        // The lifecycle puts the folder bin of a layer on the PATH.
        let said = well(clean(app.path("layers/pgweir/bin/pgweir")).arg("--version"));
        assert!(said.starts_with("pgweir "), "{said}");
        let wrapped = well(clean(app.path("build/bin/start-pgbouncer")).args(["echo", "wrapped"]));
        assert_eq!(wrapped, "wrapped\n");
        // Of the layers, one that is only kept comes back for the next build.
        fs::remove_dir_all(app.path("layers/pgweir")).unwrap();
        fs::remove_file(app.path("layers/pgweir.toml")).unwrap();
    }
    let pack: toml::Table = super::text("buildpack/buildpack.toml").parse().unwrap();
    assert_eq!(pack["buildpack"]["version"].as_str(), Some(env!("CARGO_PKG_VERSION")));
}
