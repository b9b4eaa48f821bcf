# `make` alone prints the targets.
export DEMO_SECONDS ?= 30

.PHONY: help deps build demo test test-long fuzz lint bench

help: ## Print this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1#/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-18s %s\n", $$1, $$2}'

deps: ## Get Postgres' server programs, crates and drivers
	@.ci/deps

build: ## Build the release program, target/release/pgweir
	cargo build --release --locked

# exec: a Ctrl-C reaches the demo itself, which stops what it started.
demo: ## See pgweir work on a private Postgres primary and follower (DEMO_SECONDS=30; 0 until Ctrl-C)
	@.ci/deps demo
	cargo build --release --locked
	@exec target/release/pgweir demo

test: deps ## Run every test
	cargo test --workspace --locked --no-fail-fast

test-long: deps ## Run every test, then the long ones: 10 million transactions and 10 million operations of the oracle (under 110 minutes; tests/long.md)
	@.ci/test-long

fuzz: ## Fuzz every target for a while (FUZZ_SECONDS=20 each); a finding fails and says how to replay it
	@.ci/fuzz

lint: ## Check format, lints (of the build without the grammar, too) and documentation; warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy -p pgweir --no-default-features --lib --bins --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

bench: ## Compare CPU per transaction with PgBouncer's (PGBOUNCER=/path, ARGS=...)
	@.ci/deps bench >/dev/null
	cargo build --release --locked --workspace
	PGBOUNCER=$$(.ci/deps bench 2>/dev/null) target/release/pgweir-load $(ARGS)
