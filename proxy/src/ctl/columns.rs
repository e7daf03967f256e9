//! Which fields of which objects make which table.

use std::io::Write;

use anyhow::Result;
use serde_json::{Map, Value};

use super::table::{cell, lay_out, printable};

/// One kind of object in an answer.
pub(super) struct Section {
    /// The list that it comes in.
    pub(super) list: &'static str,
    /// The event that it comes as.
    pub(super) event: &'static str,
    /// The key of its array in the JSON output.
    pub(super) key: &'static str,
    /// Above the table; empty: nothing.
    heading: &'static str,
    /// Said instead of an empty table.
    none: &'static str,
    /// Titles and fields; none: one line per field.
    columns: &'static [(&'static str, &'static str)],
}

pub(super) const SECTIONS: &[Section] = &[
    Section {
        list: "backends",
        event: "backend",
        key: "backends",
        heading: "",
        none: "no backends",
        columns: &[
            ("BACKEND", "backend"),
            ("ADDRESS", "address"),
            ("HEALTH", "health"),
            ("STATE", "state"),
            ("LIMIT", "limit"),
            ("USED", "used"),
            ("IN-FLIGHT", "in_flight"),
            ("IN-LEDGER", "connections"),
            ("IN-KERNEL", "sockets"),
            ("LEDGER", "ledger"),
            ("KERNEL", "kernel"),
            ("FINDINGS", "findings"),
        ],
    },
    Section {
        list: "backends",
        event: "total",
        key: "total",
        heading: "All backends",
        none: "",
        columns: &[
            ("LIMIT", "limit"),
            ("USED", "used"),
            ("IN-LEDGER", "connections"),
            ("IN-KERNEL", "sockets"),
            ("FINDINGS", "findings"),
        ],
    },
    Section {
        list: "connections",
        event: "connection",
        key: "connections",
        heading: "",
        none: "no connections",
        columns: &[
            ("COOKIE", "cookie"),
            ("BACKEND", "backend"),
            ("LOCAL", "local"),
            ("REMOTE", "remote"),
            ("TCP", "tcp_state"),
            ("HELD", "held"),
            ("KIND", "kind"),
            ("LEDGER", "ledger_state"),
            ("IN-FLIGHT", "in_flight"),
            ("CARRIED", "carried"),
            ("AGE", "age_seconds"),
            ("BYTE-KERNEL", "kernel_last_byte_seconds"),
            ("BYTE-LEDGER", "ledger_last_byte_seconds"),
            ("UNREAD", "unread"),
            ("OWNER", "owner"),
            ("HEADER", "header"),
            ("FINDING", "finding"),
        ],
    },
    Section {
        list: "clients",
        event: "listener",
        key: "listeners",
        heading: "Listeners",
        none: "no listeners",
        columns: &[
            ("LISTENER", "listener"),
            ("CONNECTIONS", "connections"),
            ("IN-FLIGHT", "in_flight"),
            ("QUERIES", "queries"),
            ("OPENED", "opened"),
            ("CLOSED", "closed"),
            ("REFUSED", "refused"),
        ],
    },
    Section {
        list: "clients",
        event: "client",
        key: "clients",
        heading: "Client connections that own backend connections",
        none: "none",
        columns: &[
            ("OWNER", "owner"),
            ("WORKER", "worker"),
            ("TLS", "tls"),
            ("CONNECTIONS", "connections"),
            ("HEADERS", "distinct_headers"),
            ("IN-FLIGHT", "in_flight"),
            ("CARRIED", "carried"),
            ("OLDEST", "oldest_seconds"),
            ("LAST-BYTE", "last_byte_seconds"),
            ("STATES", "states"),
            ("BACKENDS", "backends"),
        ],
    },
    Section {
        list: "tlvs",
        event: "headers",
        key: "tlvs",
        heading: "",
        none: "no backends",
        columns: &[
            ("BACKEND", "backend"),
            ("POOL", "pool"),
            ("IDENTITY", "identity"),
            ("CONNECTIONS", "connections"),
            ("WITHOUT-HEADER", "without_header"),
            ("DISTINCT-HEADERS", "distinct_headers"),
            ("QUERIES", "queries"),
            ("REUSED", "reused"),
            ("TLVS", "tlvs"),
        ],
    },
    Section {
        list: "findings",
        event: "finding",
        key: "findings",
        heading: "Findings now",
        none: "none",
        columns: &[
            ("COOKIE", "cookie"),
            ("CLASS", "class"),
            ("BACKEND", "backend"),
            ("AGE", "age_seconds"),
            ("SINCE", "since_seconds"),
            ("SWEEPS", "sweeps"),
            ("OWNER", "owner"),
            ("TLVS", "tlv_types"),
            ("HELD-BACK", "held_back"),
            ("EVIDENCE", "evidence"),
            ("CHANGES", "changes"),
        ],
    },
    Section {
        list: "reaps",
        event: "reap",
        key: "reaps",
        heading: "Reapings, oldest first",
        none: "none",
        columns: &[
            ("NUMBER", "serial"),
            ("TIME", "time"),
            ("COOKIE", "cookie"),
            ("CLASS", "class"),
            ("BACKEND", "backend"),
            ("AGE", "age_seconds"),
            ("OWNER", "owner"),
            ("TLVS", "tlv_types"),
            ("ORDERED", "ordered"),
            ("RUNG", "rung"),
            ("OUTCOME", "outcome"),
            ("NOTE", "note"),
            ("EVIDENCE", "evidence"),
            ("CHANGES", "changes"),
        ],
    },
    Section { list: "view", event: "view", key: "view", heading: "", none: "", columns: &[] },
];

/// Prints every section that was asked for.
pub(super) fn print(shown: &Map<String, Value>, output: &mut impl Write) -> Result<()> {
    let mut first = true;
    for section in SECTIONS {
        let Some(rows) = shown.get(section.key).and_then(Value::as_array) else { continue };
        if !std::mem::take(&mut first) {
            writeln!(output)?;
        }
        if !section.heading.is_empty() {
            writeln!(output, "{}:", section.heading)?;
        }
        if rows.is_empty() {
            writeln!(output, "{}", section.none)?;
        } else if section.columns.is_empty() {
            for row in rows {
                write!(output, "{}", list(row))?;
            }
        } else {
            let titles: Vec<&str> = section.columns.iter().map(|(title, _)| *title).collect();
            let cells = |row: &Value| section.columns.iter().map(|(_, field)| column(field, &row[*field])).collect();
            let rows: Vec<Vec<String>> = rows.iter().map(cells).collect();
            write!(output, "{}", lay_out(&titles, &rows))?;
        }
    }
    Ok(())
}

/// The flight recorder has a form of its own, all else that of its type.
fn column(field: &str, value: &Value) -> String {
    match (field, value) {
        ("changes", Value::Array(changes)) if !changes.is_empty() => {
            let state = |change: &Value, view: &str| change[view].as_str().map_or_else(|| "none".to_owned(), printable);
            let one = |change: &Value| {
                let ago = change["seconds_ago"].as_f64().unwrap_or(0.0);
                format!("{ago:.1} s ago {}/{}", state(change, "tcp_state"), state(change, "ledger_state"))
            };
            changes.iter().map(one).collect::<Vec<_>>().join(", ")
        }
        ("time", Value::Number(time)) => time.as_f64().map(utc).unwrap_or_default(),
        _ => cell(value),
    }
}

/// One line per field.
fn list(row: &Value) -> String {
    let fields: Vec<_> = row.as_object().into_iter().flatten().collect();
    let rows: Vec<Vec<String>> = fields
        .iter()
        .map(|(name, value)| {
            let text = match value {
                // Times of sweeps are far below a second.
                Value::Number(number) if name.ends_with("sweep_seconds") => number.to_string(),
                value => column(if name.as_str() == "last_success" { "time" } else { name.as_str() }, value),
            };
            vec![(*name).clone(), text]
        })
        .collect();
    let width = rows.iter().filter_map(|row| row.first()).map(String::len).max().unwrap_or(0);
    rows.iter().map(|row| format!("{:width$}  {}\n", row[0], row[1])).collect()
}

/// Unix time as `2026-01-31T23:59:59Z` (proleptic Gregorian, by the algorithm of Howard Hinnant's `civil_from_days`).
pub(super) fn utc(time: f64) -> String {
    if time <= 0.0 {
        return "never".to_owned();
    }
    let seconds = time as u64;
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_date() {
        // As `date -u -d @N` prints them.
        assert_eq!(utc(1.0), "1970-01-01T00:00:01Z");
        assert_eq!(utc(951_827_696.9), "2000-02-29T12:34:56Z");
        assert_eq!(utc(1_798_761_599.0), "2026-12-31T23:59:59Z");
        assert_eq!(utc(0.0), "never");
    }
}
