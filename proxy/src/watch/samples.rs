//! One number out of a page of metrics: the text formats of Prometheus and of OpenMetrics, as far as their samples go.
//!
//! Both write a sample as `NAME{LABEL="VALUE",...} NUMBER`, with a time after it at most; all other lines are comments.

use std::fmt;

/// Which samples are added up: those of one name, with these labels among theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selector {
    name: String,
    labels: Vec<Label>,
}

/// A label's name and value.
type Label = (String, String);

/// What is wrong with a selector or a page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SampleError {
    /// The selector is none.
    #[error("{0:?} is neither NAME nor NAME{{label=\"value\",...}}")]
    Selector(String),
    /// No sample of that kind is on the page.
    #[error("no sample of {0} is there")]
    Missing(String),
    /// The number of such a sample is none, or adds up to none.
    #[error("{0} is not a number")]
    Number(String),
}

impl Selector {
    /// Reads `NAME` or `NAME{label="value",...}`.
    ///
    /// # Errors
    /// It is neither.
    pub(super) fn parse(text: &str) -> Result<Self, SampleError> {
        match series(text.trim()) {
            Some((name, labels, "")) => Ok(Self { name: name.to_owned(), labels }),
            _ => Err(SampleError::Selector(text.to_owned())),
        }
    }

    /// The sum of all samples on the page that fit. Lines that cannot be read are other people's.
    ///
    /// # Errors
    /// There is none, or one is no finite number.
    pub(super) fn sum(&self, page: &str) -> Result<f64, SampleError> {
        let mut sum = None;
        for line in page.lines().filter(|line| line.starts_with(&self.name)) {
            let Some((name, labels, rest)) = series(line) else { continue };
            if name != self.name || !self.labels.iter().all(|label| labels.contains(label)) {
                continue;
            }
            let number = rest.split_ascii_whitespace().next().and_then(|number| number.parse::<f64>().ok());
            match number.filter(|number| number.is_finite()) {
                Some(number) => sum = Some(sum.unwrap_or(0.0) + number),
                None => return Err(SampleError::Number(line.to_owned())),
            }
        }
        sum.ok_or_else(|| SampleError::Missing(self.to_string()))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (index, (label, value)) in self.labels.iter().enumerate() {
            write!(f, "{}{label}={value:?}", if index == 0 { '{' } else { ',' })?;
        }
        if self.labels.is_empty() { Ok(()) } else { f.write_str("}") }
    }
}

/// A name, its labels, and what follows them.
fn series(text: &str) -> Option<(&str, Vec<Label>, &str)> {
    let (name, mut rest) = word(text, ':')?;
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside.trim_start();
        loop {
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, after) = word(rest, '_')?;
            let (value, after) = quoted(after.trim_start().strip_prefix('=')?.trim_start())?;
            labels.push((label.to_owned(), value));
            rest = after.trim_start();
            rest = match rest.strip_prefix(',') {
                Some(after) => after.trim_start(),
                None => rest,
            };
        }
    }
    Some((name, labels, rest))
}

/// A name, of letters, digits, underscores and `also`, not beginning with a digit; and what follows.
fn word(text: &str, also: char) -> Option<(&str, &str)> {
    let of_name = |character: char| character.is_ascii_alphanumeric() || character == '_' || character == also;
    let end = text.find(|character| !of_name(character)).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    name.starts_with(|first: char| !first.is_ascii_digit()).then_some((name, rest))
}

/// A value between quotation marks, unescaped; and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.strip_prefix('"')?.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '"' => return Some((value, text.get(index + 2..)?)),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use proptest::prelude::*;

    use super::*;

    const PAGE: &str = "\
# HELP dnsdist_server_tcpcurrentconnections The number of current TCP connections
# TYPE dnsdist_server_tcpcurrentconnections gauge
dnsdist_server_tcpcurrentconnections{server=\"a\",address=\"127.0.0.1:53\"} 60
dnsdist_server_tcpcurrentconnections{server=\"b\",address=\"127.0.0.2:53\"} 1.5e1 1700000000000
dnsdist_server_tcpcurrentconnections_more 7
plain 3
odd{label=\"a \\\"b\\\" \\\\ c\\nd\", } -1
broken{label= 1
infinite +Inf
# EOF
";

    fn sum(selector: &str) -> Result<f64, SampleError> {
        Selector::parse(selector).unwrap().sum(PAGE)
    }

    #[test]
    fn samples_of_a_name_are_added_up() {
        assert_eq!(sum("dnsdist_server_tcpcurrentconnections"), Ok(75.0));
        assert_eq!(sum("dnsdist_server_tcpcurrentconnections{server=\"b\"}"), Ok(15.0));
        assert_eq!(sum("dnsdist_server_tcpcurrentconnections{address=\"127.0.0.1:53\",server=\"a\"}"), Ok(60.0));
        assert_eq!(sum("plain"), Ok(3.0));
        assert_eq!(sum(r#"odd{label="a \"b\" \\ c\nd"}"#), Ok(-1.0));
    }

    #[test]
    fn what_is_not_there_or_no_number_is_said() {
        let missing = sum("dnsdist_server_tcpcurrentconnections{server=\"c\"}").unwrap_err().to_string();
        assert_eq!(missing, "no sample of dnsdist_server_tcpcurrentconnections{server=\"c\"} is there");
        assert_eq!(sum("infinite"), Err(SampleError::Number("infinite +Inf".to_owned())));
        assert!(matches!(sum("broken"), Err(SampleError::Missing(_))));
        assert!(matches!(sum("plai"), Err(SampleError::Missing(_))));
    }

    #[test]
    fn a_selector_is_a_name_with_labels_or_without() {
        for bad in ["", "9a", "a b", "a{", "a{b}", "a{b=c}", "a{b=\"c\"", "a{b=\"c\"} 1", "{a=\"b\"}"] {
            let error = Selector::parse(bad).unwrap_err().to_string();
            assert!(error.contains("is neither NAME nor NAME{label=\"value\",...}"), "{bad}: {error}");
        }
        assert_eq!(Selector::parse(" a:b{c=\"d\"} ").unwrap().to_string(), "a:b{c=\"d\"}");
    }

    proptest! {
        #[test]
        fn no_page_makes_it_panic(page in "\\PC{0,200}", lines in "(a|b|\\{|\\}|\"|=|,|\\\\|\n| |1){0,60}") {
            let selector = Selector::parse("a{b=\"1\"}").unwrap();
            let _ = selector.sum(&page);
            let _ = selector.sum(&lines);
            let _ = Selector::parse(&lines);
        }

        #[test]
        fn every_label_value_is_found_again(value in "\\PC{0,20}", number in -1e9..1e9f64) {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let page = format!("a{{b=\"x\",c=\"{escaped}\"}} {number}\n");
            let selector = Selector { name: "a".to_owned(), labels: vec![("c".to_owned(), value)] };
            prop_assert_eq!(selector.sum(&page), Ok(number));
        }
    }
}
