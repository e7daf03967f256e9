//! Choosing a kernel view.

use std::net::SocketAddr;

use crate::config::View;

use super::beside::{DiagBeside, EbpfBeside, Who};
use super::diag::DiagView;
use super::view::EbpfView;
use super::{Crosscheck, KernelSnapshot, KernelView, Source, ViewError};

/// A view, where it comes from, and why this one.
pub type Opened = (Box<dyn KernelView>, Source, String);

/// Opens the view that the configuration asks for.
///
/// `listeners` are the addresses on which this process accepts connections, with their real ports: accepted sockets are not
/// outgoing. Those that a view meets itself it adds. `max_sockets` bounds a snapshot of the eBPF view.
///
/// # Errors
/// The view that was asked for cannot be had; with [`View::Auto`], not even the fallback.
pub fn open(choice: View, listeners: &[SocketAddr], max_sockets: u32) -> Result<Opened, ViewError> {
    match choice {
        View::Ebpf => ebpf(listeners, max_sockets, "as configured"),
        View::SockDiag => sock_diag(listeners, "as configured".to_owned()),
        View::None => Ok((Box::new(NoView), Source::None, "as configured".to_owned())),
        View::Auto => ebpf(listeners, max_sockets, "eBPF is available")
            .or_else(|error| sock_diag(listeners, format!("eBPF is not available: {error}"))),
    }
}

/// Opens a view of other processes: of their sockets towards `peers`, and no others.
///
/// `max_sockets` bounds a snapshot of the eBPF view.
///
/// # Errors
/// The view that was asked for cannot be had, a process may not be read, or the one with this id is not there. That there is
/// none (yet) with a name or in a cgroup is no error.
pub fn open_beside(choice: View, who: &Who, peers: &[SocketAddr], max_sockets: u32) -> Result<Opened, ViewError> {
    match choice {
        View::Ebpf => ebpf_beside(who, peers, max_sockets, "as configured"),
        View::SockDiag => sock_diag_beside(who, peers, "as configured".to_owned()),
        View::None => Ok((Box::new(NoView), Source::None, "as configured".to_owned())),
        View::Auto => ebpf_beside(who, peers, max_sockets, "eBPF is available")
            .or_else(|error| sock_diag_beside(who, peers, format!("eBPF is not available: {error}"))),
    }
}

fn ebpf_beside(who: &Who, peers: &[SocketAddr], max_sockets: u32, reason: &str) -> Result<Opened, ViewError> {
    let view = EbpfBeside::open(who, peers, max_sockets)?;
    Ok((Box::new(view), Source::Ebpf, reason.to_owned()))
}

fn sock_diag_beside(who: &Who, peers: &[SocketAddr], reason: String) -> Result<Opened, ViewError> {
    Ok((Box::new(DiagBeside::open(who, peers)?), Source::SockDiag, reason))
}

fn ebpf(listeners: &[SocketAddr], max_sockets: u32, reason: &str) -> Result<Opened, ViewError> {
    let view = EbpfView::open(listeners, max_sockets)?;
    Ok((Box::new(view), Source::Ebpf, reason.to_owned()))
}

fn sock_diag(listeners: &[SocketAddr], reason: String) -> Result<Opened, ViewError> {
    Ok((Box::new(DiagView::open(listeners)?), Source::SockDiag, reason))
}

/// The view that is off.
struct NoView;

impl KernelView for NoView {
    fn source(&self) -> Source {
        Source::None
    }

    fn snapshot(&mut self) -> Result<KernelSnapshot, ViewError> {
        Err(ViewError::Off)
    }

    fn crosscheck(&mut self) -> Result<Crosscheck, ViewError> {
        Err(ViewError::Off)
    }
}
