//! `counterfoil ctl`: looks into the running process, or has it do something, over its admin socket.

mod columns;
mod exchange;
mod table;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use crate::stdout::Stdout;
pub(crate) use exchange::{describe, exchange};

/// For one page of a list to come: a sweep may be in the way.
const PATIENCE: Duration = Duration::from_secs(30);

/// A reaping can last this long without a word.
const REAPING: Duration = Duration::from_secs(90);

/// A list with more pages than this grows faster than it is read.
const MAX_PAGES: usize = 1000;

/// Look into the running process, or have it do something.
#[derive(Args, Clone, Debug)]
pub struct CtlArgs {
    /// The running process's `[admin] socket`.
    #[arg(long, global = true, default_value = "/run/counterfoil/counterfoil.sock")]
    socket: PathBuf,

    /// A table for people, or JSON.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,

    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Show what there is.
    Show {
        #[arg(value_enum)]
        what: What,
    },
    /// Reap one finding now, whatever `watchdog.reap` says.
    Reap {
        /// The socket's cookie, as `show leaks` has it; decimal, or hexadecimal with 0x.
        #[arg(value_name = "ID", value_parser = parse_cookie)]
        cookie: u64,
    },
    /// Read the configuration again; as SIGHUP does. If anything is wrong with it, nothing is changed.
    Reload,
    /// Accept no client any more, answer what is in flight, then end; as SIGTERM does.
    Drain,
    /// Make one bounded leak and follow it until it is gone.
    Drill(crate::drill::Order),
}

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Per backend, the ledger beside the kernel's sockets, limits and findings.
    Backends,
    /// Socket by socket, what the ledger and the kernel say.
    Connections,
    /// Client connections that own backend connections, and the listeners.
    Clients,
    /// Types of TLVs and distinct headers per backend.
    Tlvs,
    /// What is wrong now, and the last 1,000 reapings.
    Leaks,
    /// The kernel view and the watchdog.
    View,
}

impl What {
    /// The lists that it is made of, as the socket calls them.
    const fn lists(self) -> &'static [&'static str] {
        match self {
            Self::Backends => &["backends"],
            Self::Connections => &["connections"],
            Self::Clients => &["clients"],
            Self::Tlvs => &["tlvs"],
            Self::Leaks => &["findings", "reaps"],
            Self::View => &["view"],
        }
    }
}

/// Runs one command and returns the exit code: 0 done, 1 not.
pub fn run(args: &CtlArgs) -> ExitCode {
    let mut output = Stdout::lock();
    let done = match &args.command {
        Command::Show { what } => show(*what, args, &mut output).map(|()| true),
        Command::Reap { cookie } => follow(&json!({"cmd": "reap", "cookie": cookie}), REAPING, args, &mut output),
        Command::Drill(order) => follow(&crate::drill::request(order), crate::drill::SILENCE, args, &mut output),
        Command::Reload => follow(&json!({"cmd": "reload"}), PATIENCE, args, &mut output),
        Command::Drain => follow(&json!({"cmd": "drain"}), PATIENCE, args, &mut output),
    };
    match done.and_then(|done| Ok(output.flush().map(|()| done)?)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // Nobody is left to tell if standard error is closed.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints each step as it comes. True if it succeeded.
fn follow(request: &Value, silence: Duration, args: &CtlArgs, output: &mut impl Write) -> Result<bool> {
    let done = exchange(&args.socket, request, silence, |event| {
        match args.output {
            Output::Table => writeln!(output, "{}", describe(event))?,
            Output::Json => writeln!(output, "{event}")?,
        }
        Ok(())
    })?;
    Ok(done["ok"] == true)
}

fn show(what: What, args: &CtlArgs, output: &mut impl Write) -> Result<()> {
    let mut shown = Map::new();
    what.lists().iter().for_each(|list| begin(list, &mut shown));
    let mut whole = Value::Null;
    for list in what.lists() {
        whole = read(list, args, &mut shown)?;
    }
    match args.output {
        Output::Json => {
            single_out(&mut shown);
            shown.insert("source".to_owned(), whole["source"].take());
            shown.insert("uncertain".to_owned(), whole["uncertain"].take());
            writeln!(output, "{:#}", Value::Object(shown))?;
        }
        Output::Table => print(&shown, &whole, output)?,
    }
    Ok(())
}

/// The arrays of a list's objects: also what is empty is there.
pub(crate) fn begin(list: &str, shown: &mut Map<String, Value>) {
    for section in columns::SECTIONS.iter().filter(|section| section.list == list) {
        shown.insert(section.key.to_owned(), Value::Array(Vec::new()));
    }
}

/// Puts an object of a list into the array of its kind.
pub(crate) fn gather(event: &Value, shown: &mut Map<String, Value>) {
    let Some(mut fields) = event.as_object().cloned() else { return };
    let Some(Value::String(kind)) = fields.remove("event") else { return };
    if let Some(section) = columns::SECTIONS.iter().find(|section| section.event == kind) {
        let rows = shown.entry(section.key).or_insert_with(|| Value::Array(Vec::new()));
        rows.as_array_mut().into_iter().for_each(|rows| rows.push(Value::Object(fields.clone())));
    }
}

/// Makes an object of the arrays that can have but one.
pub(crate) fn single_out(shown: &mut Map<String, Value>) {
    for single in ["view", "total"] {
        if let Some(value) = shown.get_mut(single) {
            *value = value[0].take();
        }
    }
}

/// Tables for people. `whole` is what ended the list.
pub(crate) fn print(shown: &Map<String, Value>, whole: &Value, output: &mut impl Write) -> Result<()> {
    columns::print(shown, output)?;
    if let Some(reason) = whole["uncertain"].as_str() {
        writeln!(output, "\nThe kernel view is not to be relied on: {}", table::printable(reason))?;
    }
    Ok(())
}

/// Reads a list page by page into `shown`, by the kind of its objects; returns what ends the last page.
fn read(list: &str, args: &CtlArgs, shown: &mut Map<String, Value>) -> Result<Value> {
    let mut after = 0;
    for _ in 0..MAX_PAGES {
        let done = exchange(&args.socket, &json!({"cmd": "show", "what": list, "after": after}), PATIENCE, |event| {
            gather(event, shown);
            Ok(())
        })?;
        if done["ok"] != true {
            bail!("{}: {}", args.socket.display(), done["message"].as_str().unwrap_or("refused"));
        }
        match done["next"].as_u64() {
            Some(next) if next > after => after = next,
            _ => return Ok(done),
        }
    }
    bail!("{}: the list of {list} does not end", args.socket.display());
}

/// A cookie as `ss -e` (hexadecimal) or this program (decimal) prints it.
fn parse_cookie(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

#[cfg(test)]
#[path = "ctl_tests.rs"]
mod tests;
