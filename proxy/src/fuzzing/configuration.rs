//! The configuration's text.

use crate::config::check::{self, Limits};
use crate::config::error::{MOST, Problem};
use crate::config::{effort, forecast, from_str, print};
use crate::file::FileFault;

/// In steps that grow with its length only, a text is refused with errors that name line and key, or read; then it can be forecast, and the configuration in
/// effect, printed, is read as the same.
pub fn configuration(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let before = effort::spent();
    let read = from_str("f", &text);
    let (steps, length) = ((effort::spent() - before) as usize, text.len());
    // The whole format is asked for even if nothing of it is there; errors have places in a line, which may be all.
    let most = 1_000 + (20 + MOST) * length;
    assert!(steps <= most, "{steps} steps for {length} octets, more than {most}");
    match read {
        Ok(config) => {
            let printed = print::to_toml(&config);
            match from_str("printed", &printed) {
                Ok(read) => assert_eq!(read, config, "{printed}"),
                Err(errors) => panic!("{errors}\n{printed}"),
            }
            let limits =
                Limits { descriptors: Some(1024), ports: Some(28_232), memory: Some(64 << 20), fast_open: Some(0) };
            assert!(forecast::lines(&config, limits).iter().all(|line| !line.contains('\n')));
            for warning in check::warnings(&config, limits) {
                assert!(!warning.to_string().is_empty());
            }
        }
        Err(errors) => {
            assert!(errors.iter().next().is_some());
            let told = || errors.iter().filter(|error| !matches!(error.problem, Problem::More(_)));
            assert!(told().is_sorted_by_key(|error| error.position) && told().count() <= MOST);
            for error in errors.iter() {
                let Some(position) = error.position else {
                    assert!(
                        matches!(error.problem, Problem::File(FileFault::TooLong(_)) | Problem::More(_)),
                        "{error}"
                    );
                    continue;
                };
                // One line more than there are: the end of a text that ends with a line feed.
                assert!((1..=text.lines().count() + 1).contains(&position.line), "{error}");
                assert!(position.column >= 1);
                let of_no_key = matches!(error.problem, Problem::Syntax(_) | Problem::Foreign(_));
                assert!(error.key.is_some() || of_no_key, "{error}");
                assert!(error.to_string().starts_with(&format!("f:{}:{}: ", position.line, position.column)));
            }
        }
    }
}
