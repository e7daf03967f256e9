//! Why a backend connection was closed (I3): one closed enum for logs, metrics and alarms.

use crate::dns::synth::{ExtendedError, InfoCode, Rcode};

macro_rules! reasons {
    ($(#[$meta:meta])* $vis:vis enum $name:ident { $($(#[$doc:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        $vis enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// Every reason, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The label in metrics and logs.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }

            /// The reason with this number.
            pub fn from_u8(number: u8) -> Option<Self> {
                Self::ALL.get(usize::from(number)).copied()
            }
        }
    };
}

reasons! {
    /// Why a backend connection was closed. Every close has exactly one reason.
    pub enum CloseReason {
        /// Nothing in flight for `[connections] idle_timeout`.
        IdleTimeout = "idle_timeout",
        /// Older than `[connections] max_age` and idle.
        MaxAge = "max_age",
        /// The peer sent FIN or a reset before it had answered any of the queries on it: it does not want them, or not
        /// the PROXY header.
        Unanswered = "unanswered",
        /// The peer sent FIN.
        PeerClosed = "peer_closed",
        /// The peer reset the connection, or reading or writing failed.
        PeerReset = "peer_reset",
        /// A connection for one query whose answer is complete.
        OneShotDone = "one_shot_done",
        /// A health check that passed.
        Checked = "checked",
        /// The client connection that owned it ended.
        OwnerGone = "owner_gone",
        /// Its place was needed for another header or client: it was idle, or it was given no more queries until it was.
        Evicted = "evicted",
        /// Idle, and more idle connections than `max_idle_per_backend`.
        ExcessIdle = "excess_idle",
        /// This host had no descriptor, no memory or no local port for it, which says nothing of the backend.
        HostShortage = "host_shortage",
        /// `connect(2)` failed.
        ConnectFailed = "connect_failed",
        /// Not connected within `connect_timeout`, with the TLS handshake if there is one.
        ConnectTimeout = "connect_timeout",
        /// The backend's certificate is not valid, not for its `server_name`, or from nobody that is trusted. No query was
        /// sent.
        CertificateRefused = "certificate_refused",
        /// The TLS handshake failed for another reason. No query was sent.
        HandshakeFailed = "handshake_failed",
        /// The peer did not read for `write_timeout`.
        WriteTimeout = "write_timeout",
        /// An answer that matches no query, or the wrong question, or broken framing.
        ProtocolViolation = "protocol_violation",
        /// Every query on it timed out, and the peer gave no sign of life since.
        Unresponsive = "unresponsive",
        /// The backend asked for it: edns-tcp-keepalive with a timeout of zero (RFC 7828 section 3.2.2).
        AskedToClose = "asked_to_close",
        /// The configuration has changed: what it was opened for is no more.
        Reconfigured = "reconfigured",
        /// The process drains.
        Drained = "drained",
        /// The watchdog asked for it.
        Reaped = "reaped",
        /// Dropped without a reason: a bug, counted so that it is seen.
        Dropped = "dropped",
    }
}

impl CloseReason {
    /// Whether the peer brought it about, by closing or by sending what it must not.
    pub const fn is_by_peer(self) -> bool {
        matches!(self, Self::Unanswered | Self::PeerClosed | Self::PeerReset | Self::ProtocolViolation)
    }

    /// Whether it came about before any query could be sent.
    pub const fn is_before_queries(self) -> bool {
        matches!(self, Self::ConnectFailed | Self::ConnectTimeout | Self::CertificateRefused | Self::HandshakeFailed)
    }
}

reasons! {
    /// Why a client connection was closed.
    pub enum ClientCloseReason {
        /// The client closed it.
        ClientClosed = "client_closed",
        /// The client reset it, or reading or writing failed.
        ClientReset = "client_reset",
        /// No whole message for the listener's `idle_timeout`.
        IdleTimeout = "idle_timeout",
        /// A message took longer than `message_timeout` from its first byte to its last.
        MessageTimeout = "message_timeout",
        /// The client did not read for `write_timeout`.
        WriteTimeout = "write_timeout",
        /// A query failed, and `on_failure = "close"`.
        QueryFailed = "query_failed",
        /// Broken framing: a length too short for a DNS header.
        Malformed = "malformed",
        /// It sent nothing but messages that are not forwarded: malformed ones, those that are not supported or refused.
        NotForwarded = "not_forwarded",
        /// It has asked `max_queries_per_connection` times.
        MaxQueries = "max_queries",
        /// A zone transfer broke off after its first message: nothing else would tell the client.
        TransferBroken = "transfer_broken",
        /// It was open for `max_connection_duration`.
        MaxDuration = "max_duration",
        /// The client did not keep to TLS.
        TlsError = "tls_error",
        /// A DSO message that has a meaning in a session only (RFC 8490 section 5.1), and there is none here.
        NoDsoSession = "no_dso_session",
        /// A PROXY header from a client whose word is not taken.
        ProxyUntrusted = "proxy_untrusted",
        /// The process drains.
        Drained = "drained",
        /// Dropped without a reason: a bug, counted so that it is seen.
        Dropped = "dropped",
    }
}

reasons! {
    /// Why a query got SERVFAIL, or another answer of our own, instead of a backend's.
    pub enum FailReason {
        /// No answer within `query_timeout`.
        Timeout = "timeout",
        /// The backend connection died, and no retry was left or allowed.
        BackendClosed = "backend_closed",
        /// No connection could be opened.
        ConnectFailed = "connect_failed",
        /// It waited `max_wait` at a cap, or `max_waiting` queries waited already and none of them made way.
        NoCapacity = "no_capacity",
        /// This host had no descriptor, no memory or no local port for a connection all the time that it waited.
        HostShortage = "host_shortage",
        /// No backend of the pool is up.
        NoBackend = "no_backend",
        /// The PROXY header would be longer than `max_header`.
        HeaderTooLong = "header_too_long",
        /// The backend answered with the wrong question, or what it sent is no zone transfer.
        BadAnswer = "bad_answer",
        /// The client does not read, and `max_pending_answers` of what it was to get are kept for it already.
        ClientSlow = "client_slow",
        /// No question, one that cannot be read, or an IXFR query without its SOA (FORMERR).
        Malformed = "malformed",
        /// An opcode that is not supported (NOTIMP).
        NotSupported = "not_supported",
        /// The listener takes no such query: `refuse` (REFUSED).
        Refused = "refused",
    }
}

impl FailReason {
    /// What the client is told, if it is told anything: the code, and the extended error that says why (RFC 8914).
    pub const fn answer(self) -> (Rcode, ExtendedError) {
        let (rcode, code, text) = match self {
            Self::Timeout => (Rcode::ServFail, InfoCode::NetworkError, "no backend answered in time"),
            Self::BackendClosed => (Rcode::ServFail, InfoCode::NetworkError, "the backend closed the connection"),
            Self::BadAnswer => {
                (Rcode::ServFail, InfoCode::NetworkError, "the backend's answer was to another question")
            }
            Self::ConnectFailed => {
                (Rcode::ServFail, InfoCode::NoReachableAuthority, "no backend could be connected to")
            }
            Self::NoBackend => (Rcode::ServFail, InfoCode::NoReachableAuthority, "no backend is up"),
            // A passing state of this server, and another try may do.
            Self::NoCapacity => (Rcode::ServFail, InfoCode::NotReady, "all connections to backends are in use"),
            Self::HostShortage => {
                (Rcode::ServFail, InfoCode::NotReady, "this server has no means for a connection to a backend")
            }
            Self::HeaderTooLong => {
                (Rcode::ServFail, InfoCode::Other, "what the query asks for does not fit a PROXY header")
            }
            Self::ClientSlow => (Rcode::ServFail, InfoCode::Other, "too many answers have not been read"),
            // None of the codes is about queries that cannot be read.
            Self::Malformed => (Rcode::FormErr, InfoCode::Other, "the query cannot be read, or has several questions"),
            Self::NotSupported => (Rcode::NotImp, InfoCode::NotSupported, "the opcode is not forwarded"),
            Self::Refused => (Rcode::Refused, InfoCode::Prohibited, "this server does not forward such queries"),
        };
        (rcode, ExtendedError { code, text })
    }
}

reasons! {
    /// How a zone transfer ended.
    pub enum TransferEnd {
        /// All of it came.
        Complete = "complete",
        /// The client had the newest version.
        UpToDate = "up_to_date",
        /// The backend answered with an error, or with nothing.
        Declined = "declined",
        /// No message came: the client got an answer of our own.
        Failed = "failed",
        /// It broke off after the first message, and the client's connection was closed.
        Broken = "broken",
        /// The client left.
        Abandoned = "abandoned",
    }
}
