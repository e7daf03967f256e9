//! Where things are.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::command;

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Cargo's target directory, wherever the user's configuration puts it. Everything xtask gets or builds is under it.
pub(crate) fn target() -> Result<PathBuf> {
    #[derive(serde::Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    let mut cargo = command::cargo();
    cargo.args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(root());
    let metadata: Metadata = serde_json::from_str(&command::output(&mut cargo)?).context("cargo metadata")?;
    Ok(metadata.target_directory)
}

/// Held while tools are fetched or built below `target`, so that two xtasks do not do it at once.
pub(crate) fn lock(target: &Path) -> Result<fs::File> {
    fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
    let path = target.join("xtask.lock");
    let file = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Writes `contents` to `path` unless it has them already, so that nothing that depends on it is built again.
pub(crate) fn write_if_changed(path: &Path, contents: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == contents) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes an executable shell script that runs `program` with `library_path` in front of the loader's search path.
pub(crate) fn write_wrapper(path: &Path, program: &Path, library_path: &str) -> Result<()> {
    let (library_path, program) = (shell_quote(library_path), shell_quote(&program.to_string_lossy()));
    write_script(path, &format!("LD_LIBRARY_PATH={library_path} exec {program} \"$@\""))
}

/// Writes an executable shell script.
fn write_script(path: &Path, script: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    write_if_changed(path, format!("#!/bin/sh\n{script}\n").as_bytes())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", path.display()))
}

/// `word` as a shell reads it unchanged.
fn shell_quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use std::process::Command;

    use super::*;

    #[test]
    fn wrapper_sets_the_library_path_and_passes_arguments_on() {
        let directory = std::env::temp_dir().join(format!("counterfoil xtask's {}", std::process::id()));
        let (tool, wrapper) = (directory.join("tool"), directory.join("wrapper"));
        write_if_changed(&tool, b"#!/bin/sh\nprintf '%s|%s|%s' \"$LD_LIBRARY_PATH\" \"$1\" \"$2\"\n").unwrap();
        fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        write_wrapper(&wrapper, &tool, "/a:/b c").unwrap();
        let seen = command::output(Command::new(&wrapper).args(["x y", "$z"])).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(seen, "/a:/b c|x y|$z");
    }

    #[test]
    fn an_unchanged_file_keeps_its_time() {
        let path = std::env::temp_dir().join(format!("counterfoil-xtask-{}", std::process::id()));
        write_if_changed(&path, b"one").unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
        write_if_changed(&path, b"one").unwrap();
        let kept = fs::metadata(&path).unwrap().modified().unwrap() == long_ago;
        write_if_changed(&path, b"two").unwrap();
        let renewed = fs::metadata(&path).unwrap().modified().unwrap() != long_ago;
        fs::remove_file(&path).unwrap();
        assert!(kept && renewed);
    }
}
