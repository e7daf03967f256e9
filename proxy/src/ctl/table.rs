//! Text for people: values, and columns that fit them.

use serde_json::{Map, Value};

/// Without characters that would move a terminal's cursor: names come from a configuration.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}

/// A value in one line. An object is a set of counts, of which those that are zero are left out; in an array it is a
/// record, and whole.
pub(super) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => match number.as_u64() {
            Some(number) => number.to_string(),
            None => number.as_f64().map(|number| format!("{number:.1}")).unwrap_or_default(),
        },
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => printable(text),
        Value::Array(values) => {
            let record = |value: &Value| value.as_object().map_or_else(|| cell(value), |record| fields(record, true));
            or_dash(values.iter().map(record).collect::<Vec<_>>().join("; "))
        }
        Value::Object(counts) => fields(counts, false),
    }
}

fn fields(object: &Map<String, Value>, zeros: bool) -> String {
    let shown = object.iter().filter(|(_, value)| !value.is_null() && (zeros || value.as_u64() != Some(0)));
    or_dash(shown.map(|(name, value)| format!("{} {}", printable(name), cell(value))).collect::<Vec<_>>().join(", "))
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

/// Lays out rows under their titles; columns of numbers are flush right, the last column is as wide as it is.
pub(super) fn lay_out(titles: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(titles.get(column).map(|title| title.chars().count())).max().unwrap_or(0)
    };
    let numeric = |column: usize| {
        let mut cells = rows.iter().filter_map(|row| row.get(column));
        cells.all(|cell| {
            cell.starts_with(|first: char| first.is_ascii_digit() || first == '-') && !cell.contains([':', ' '])
        })
    };
    let layout: Vec<(usize, bool)> = (0..titles.len()).map(|column| (width(column), numeric(column))).collect();
    let mut text = String::new();
    let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for (cell, (width, numeric)) in row.iter().zip(&layout) {
            if !line.is_empty() {
                line.push_str("  ");
            }
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            if *numeric {
                line.push_str(&padding);
                line.push_str(cell);
            } else {
                line.push_str(cell);
                line.push_str(&padding);
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_short() {
        assert_eq!(cell(&json!(null)), "-");
        assert_eq!(cell(&json!(2.25)), "2.2");
        assert_eq!(cell(&json!({"idle": 3, "busy": 0})), "idle 3");
        assert_eq!(cell(&json!({"keyed": {"busy": 1, "idle": 2}})), "keyed busy 1, idle 2");
        assert_eq!(cell(&json!({})), "-");
        assert_eq!(cell(&json!(["a", "b"])), "a; b");
        assert_eq!(cell(&json!([{"worker": 0, "stalled": false}])), "stalled false, worker 0");
        assert_eq!(cell(&json!("a\u{1b}[2Jb\n")), "a\u{fffd}[2Jb\u{fffd}", "nothing moves the cursor");
    }

    #[test]
    fn columns_fit_and_numbers_are_flush_right() {
        let rows = [vec!["a".to_owned(), "10".to_owned(), "x".to_owned()], vec!["bcd".to_owned(), "9".to_owned()]];
        assert_eq!(lay_out(&["N", "COUNT", "Z"], &rows), "N    COUNT  Z\na       10  x\nbcd      9\n");
    }
}
