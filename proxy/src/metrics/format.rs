//! The two formats of an exposition. What is encoded is OpenMetrics 1.0; the older text format is made of it line by line.

/// The format of an exposition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' text format 0.0.4, which everybody reads.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The media type.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// OpenMetrics as text 0.0.4: there a counter's name has its `_total` in the family's lines, too, facts are gauges named
/// `_info`, and nothing marks units or the end. Samples are the same.
pub(super) fn to_text(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // Its name depends on the type, which comes next.
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take() {
                // A quotation mark is escaped in OpenMetrics only.
                let help = help.replace("\\\"", "\"");
                text.extend(["# HELP ", name, suffix, " ", &help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_type_has_its_name() {
        let openmetrics = "# HELP a_b Queries\n# TYPE a_b counter\na_b_total{x=\"1\"} 1\n# HELP c Now\n# TYPE c gauge\n\
                           c 1.5\n# HELP d Build\n# TYPE d info\nd_info{v=\"1\"} 1\n# HELP e_seconds Time\n\
                           # TYPE e_seconds histogram\n# UNIT e_seconds seconds\ne_seconds_bucket{le=\"+Inf\"} 1\n\
                           e_seconds_sum 2.0\ne_seconds_count 1\n# EOF\n";
        let text = "# HELP a_b_total Queries\n# TYPE a_b_total counter\na_b_total{x=\"1\"} 1\n# HELP c Now\n\
                    # TYPE c gauge\nc 1.5\n# HELP d_info Build\n# TYPE d_info gauge\nd_info{v=\"1\"} 1\n\
                    # HELP e_seconds Time\n# TYPE e_seconds histogram\ne_seconds_bucket{le=\"+Inf\"} 1\n\
                    e_seconds_sum 2.0\ne_seconds_count 1\n";
        assert_eq!(to_text(openmetrics), text);
    }

    proptest! {
        /// Whatever a label says, each sample is there, as it was, and belongs to the family before it.
        #[test]
        fn no_sample_is_lost_or_changed(
            families in prop::collection::vec(
                ("[a-z_]{1,12}", 0usize..3, prop::collection::vec(("[ -~&&[^\"\\\\]]{0,20}", any::<u32>()), 0..4)),
                0..6,
            ),
        ) {
            let (mut openmetrics, mut samples, mut types) = (String::new(), Vec::new(), Vec::new());
            for (at, (name, kind, values)) in families.iter().enumerate() {
                let (kind, suffix, text_kind) =
                    [("counter", "_total", "counter"), ("gauge", "", "gauge"), ("info", "_info", "gauge")][*kind];
                let name = format!("{name}{at}");
                openmetrics += &format!("# HELP {name} It's # TYPE x y\n# TYPE {name} {kind}\n");
                types.push(format!("# TYPE {name}{suffix} {text_kind}"));
                for (label, value) in values {
                    let sample = format!("{name}{suffix}{{l=\"{label}\"}} {value}");
                    openmetrics += &format!("{sample}\n");
                    samples.push(sample);
                }
            }
            openmetrics += "# EOF\n";
            let text = to_text(&openmetrics);
            let (comments, rest): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.starts_with('#'));
            prop_assert_eq!(rest, samples);
            let given: Vec<&str> = comments.into_iter().filter(|line| line.starts_with("# TYPE ")).collect();
            prop_assert_eq!(given, types);
        }
    }
}
