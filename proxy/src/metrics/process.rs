//! `process_*`: what Prometheus' own client libraries call them, from `/proc/self`.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::encode::Families;

/// Reads `/proc/self` when it is scraped. What cannot be read is left out.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        if let Some(open) = open_descriptors() {
            families.gauge("process_open_fds", "Descriptors open now", open as f64)?;
        }
        let limit = getrlimit(Resource::Nofile).current.map_or(f64::INFINITY, |limit| limit as f64);
        families.gauge("process_max_fds", "Descriptors allowed", limit)?;
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        families.seconds_counter("process_cpu_seconds", "CPU time, user and system", cpu)?;
        if let Some(resident) = resident_bytes() {
            families.gauge("process_resident_memory_bytes", "Resident memory", resident as f64)?;
        }
        if let Some(started) = start_time() {
            families.gauge("process_start_time_seconds", "When the process started", started)?;
        }
        Ok(())
    }
}

fn open_descriptors() -> Option<usize> {
    // Less the one that reads the directory.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1))
}

fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

/// Boot time and the process's start in clock ticks after it (proc_pid_stat(5), field 22).
fn start_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the command's name, may hold anything but ends with the last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks: u64 = rest.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let system = fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(boot as f64 + ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic")]

    use super::*;

    #[test]
    fn the_numbers_are_this_processes() {
        let now = crate::clock::unix_seconds();
        let started = start_time().unwrap();
        assert!(started <= now + 1.0 && started > now - 3600.0, "{started} {now}");
        assert!(resident_bytes().unwrap() > 100_000);
        let before = open_descriptors().unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        assert!(open_descriptors().unwrap() > before.saturating_sub(20), "other tests open and close as well");
        drop(file);
    }
}
