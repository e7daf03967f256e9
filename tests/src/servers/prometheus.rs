//! Prometheus 2.42, to scrape the program's metrics and to evaluate its alert rules.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::metrics;
use crate::process::{self, Process};
use crate::tempdir::TempDir;
use crate::wait;

/// A running Prometheus that scrapes one target twice a second.
#[derive(Debug)]
pub struct Prometheus {
    /// The process.
    pub process: Process,
    address: SocketAddr,
    _dir: TempDir,
}

impl Prometheus {
    /// Starts it with a target, as job `counterfoil`, files of rules, and where it sends alerts.
    ///
    /// # Panics
    /// If it does not get ready.
    #[track_caller]
    pub fn start(target: SocketAddr, rules: &[PathBuf], alertmanager: Option<SocketAddr>) -> Self {
        let dir = TempDir::new("prometheus");
        let rules: Vec<String> = rules.iter().map(|path| format!("\"{}\"", path.display())).collect();
        let rules = format!("rule_files: [{}]\n", rules.join(", "));
        let alerting = alertmanager.map_or_else(String::new, |address| {
            format!("alerting: {{alertmanagers: [{{static_configs: [{{targets: [\"{address}\"]}}]}}]}}\n")
        });
        let config = format!(
            "global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}}\n{rules}{alerting}\
             scrape_configs:\n- job_name: counterfoil\n  static_configs: [{{targets: [\"{target}\"]}}]\n"
        );
        let config = format!("--config.file={}", dir.write("prometheus.yml", &config).display());
        let storage = format!("--storage.tsdb.path={}", dir.path().join("data").display());
        let (process, port, ()) = process::start_on_free_port("prometheus", |port| {
            let listen = format!("--web.listen-address=127.0.0.1:{port}");
            (Process::start("prometheus", "prometheus", &[&config, &storage, &listen]), ())
        });
        let prometheus = Self { process, address: super::loopback(port), _dir: dir };
        wait::until("prometheus is ready", Duration::from_secs(20), || {
            metrics::get(prometheus.address, "/-/ready").is_ok_and(|(head, _)| head.contains(" 200 "))
        });
        prometheus
    }

    /// The `data` of an answer of the HTTP API, such as `/api/v1/alerts`.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn api(&self, path: &str) -> Value {
        let (head, body) = metrics::get(self.address, path).unwrap_or_else(|e| panic!("{e}"));
        let mut answer: Value = serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {head}\n{body}"));
        assert_eq!(answer["status"], "success", "{path}: {body}");
        answer["data"].take()
    }

    /// The state of the target as `(health, last error)`; `unknown` until it was discovered and scraped.
    #[track_caller]
    pub fn target(&self) -> (String, String) {
        let targets = self.api("/api/v1/targets");
        let target = &targets["activeTargets"][0];
        let text = |name: &str| target[name].as_str().unwrap_or_default().to_owned();
        let health = text("health");
        (if health.is_empty() { "unknown".to_owned() } else { health }, text("lastError"))
    }

    /// Names of the alerts in state `state` (`pending` or `firing`).
    #[track_caller]
    pub fn alerts(&self, state: &str) -> Vec<String> {
        let answer = self.api("/api/v1/alerts");
        let alerts = answer["alerts"].as_array().cloned().unwrap_or_default();
        alerts
            .iter()
            .filter(|alert| alert["state"] == state)
            .filter_map(|alert| alert["labels"]["alertname"].as_str().map(str::to_owned))
            .collect()
    }

    /// The values of an instant query.
    #[track_caller]
    pub fn query(&self, expression: &str) -> Vec<f64> {
        let encoded: String = expression.bytes().map(|octet| format!("%{octet:02x}")).collect();
        let answer = self.api(&format!("/api/v1/query?query={encoded}"));
        let results = answer["result"].as_array().cloned().unwrap_or_default();
        results.iter().filter_map(|result| result["value"][1].as_str()?.parse().ok()).collect()
    }
}
