//! The command line.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::app::{App, Caught};
use crate::config;
use crate::ctl::CtlArgs;
use crate::demo::Demo;
use crate::logging::{self, Format};
use crate::query::QueryArgs;
use crate::stdout::Stdout;
use crate::watch::WatchArgs;

/// The exit code for a bad configuration or command line (EX_USAGE of sysexits.h).
const EX_USAGE: u8 = 64;

#[derive(Debug, Parser)]
#[command(name = "counterfoil", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the forwarder; without a configuration, a demo on loopback.
    Run(RunArgs),
    /// Check a configuration, print it as it takes effect, and say what it costs.
    CheckConfig {
        /// The configuration.
        file: PathBuf,
    },
    /// Make one bounded leak in the running process and follow it until it is gone.
    Drill {
        #[command(flatten)]
        order: crate::drill::Order,
        /// The running process's `[admin] socket`.
        #[arg(long, default_value = "/run/counterfoil/counterfoil.sock")]
        socket: PathBuf,
    },
    /// Look into the running process, or have it do something.
    Ctl(CtlArgs),
    /// Watch another process's connections to backends, by the kernel's word.
    ///
    /// Nothing is done to the process unless --reap is given: without it, findings are reported, counted, and logged as
    /// what would be reaped. Reaping severs a connection (SOCK_DESTROY); the process keeps its descriptor.
    Watch {
        #[command(flatten)]
        args: WatchArgs,
        #[command(flatten)]
        log: LogArgs,
    },
    /// Ask a DNS server over TCP, with a PROXY v2 header if wanted.
    Query(QueryArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// The configuration (TOML).
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, clap::Args)]
struct LogArgs {
    /// What is logged, such as `info,counterfoil::watchdog=debug`; goes before `[server] log`.
    #[arg(long)]
    log: Option<String>,
    /// How it is logged.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    log_format: Format,
}

impl LogArgs {
    /// Starts the log; `default` unless `--log` is given.
    fn start(&self, default: &str) -> Result<(), ExitCode> {
        logging::start(self.log.as_deref(), default, self.log_format).map_err(|error| {
            complain(&format_args!("error: --log: {error}\n"));
            ExitCode::from(EX_USAGE)
        })
    }
}

/// Runs the program and returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            // A closed standard output is no reason to fail.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match cli.command {
        Command::Run(args) => run(&args),
        Command::CheckConfig { file } => config::check::run(&file),
        Command::Drill { order, socket } => drill(&order, &socket),
        Command::Ctl(args) => crate::ctl::run(&args),
        Command::Watch { args, log } => watch(&args, &log),
        Command::Query(args) => crate::query::run(&args),
    }
}

fn drill(order: &crate::drill::Order, socket: &Path) -> ExitCode {
    let mut output = Stdout::lock();
    let done = crate::drill::client(order, socket, &mut output);
    match done.and_then(|done| Ok(output.flush().map(|()| done)?)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            complain(&format_args!("error: {error:#}\n"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &RunArgs) -> ExitCode {
    // Before anything else: from now on a signal asks for something, and ends nothing by itself.
    let signals = match Caught::new() {
        Ok(signals) => signals,
        Err(error) => {
            complain(&format_args!("error: signals cannot be caught: {error}\n"));
            return ExitCode::FAILURE;
        }
    };
    let (config, demo) = match &args.config {
        Some(file) => match config::load(file) {
            Ok(config) => (config, None),
            Err(errors) => {
                for error in errors.iter() {
                    complain(&format_args!("error: {error}\n"));
                }
                return ExitCode::from(EX_USAGE);
            }
        },
        None => match Demo::prepare() {
            Ok(demo) => (demo.config.clone(), Some(demo)),
            Err(error) => {
                complain(&format_args!("error: {error:#}\n"));
                return ExitCode::FAILURE;
            }
        },
    };
    if let Err(code) = args.log.start(&config.server.log) {
        return code;
    }
    let notes = config::check::warnings(&config, config::check::Limits::read());
    let later = args.config.iter().flat_map(|file| config::check::unreadable_later(file, &config));
    for note in notes.into_iter().chain(later) {
        tracing::warn!(%note, "configuration");
    }
    ended(serve(config, args.config.clone(), demo, signals))
}

fn watch(args: &WatchArgs, log: &LogArgs) -> ExitCode {
    let plan = match args.plan() {
        Ok(plan) => plan,
        Err(error) => {
            complain(&format_args!("error: {error}\n"));
            return ExitCode::from(EX_USAGE);
        }
    };
    if let Err(code) = log.start("info") {
        return code;
    }
    ended(plan.run())
}

/// The exit code of what runs until it is stopped.
fn ended(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "stopped");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: config::Config, file: Option<PathBuf>, demo: Option<Demo>, signals: Caught) -> anyhow::Result<()> {
    let others: Vec<_> = demo.iter().map(|demo| demo.responder.addr()).collect();
    let app = App::build(config, file, &others)?;
    let _responder = match demo {
        Some(demo) => {
            let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("counterfoil"));
            let instructions = demo.instructions(&program);
            let running = demo.responder.start()?;
            // It runs all the same if they cannot be shown.
            let mut output = Stdout::lock();
            let _ = output.write_all(instructions.as_bytes()).and_then(|()| output.flush());
            Some(running)
        }
        None => None,
    };
    app.run(signals)
}

fn complain(message: &dyn std::fmt::Display) {
    let _ = write!(std::io::stderr(), "{message}");
}
