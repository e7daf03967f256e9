#![expect(clippy::expect_used, reason = "tests panic")]

use super::*;
use crate::dns::message::first_question;
use proptest::prelude::*;

/// `www.example. HTTPS` behind a header.
const QUERY: &[u8] = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x03wWw\x07example\0\0\x41\0\x01";

fn context() -> Context<'static> {
    Context {
        client: "192.0.2.1:4000".parse().expect("an address"),
        listener: "dns",
        question: first_question(QUERY).and_then(Result::ok),
        incoming: b"\xe0\0\x03one\xe1\0\x02in\xe1\0\x05later",
        sni: "dns.example",
        random: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
    }
}

fn template(text: &str) -> Template {
    text.parse().unwrap_or_else(|error| unreachable!("{text}: {error}"))
}

fn rendered(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    template(text).render(&context(), &mut out);
    out
}

fn error(text: &str) -> (usize, TemplateErrorKind) {
    let error = text.parse::<Template>().expect_err(text);
    (error.at, error.kind)
}

#[test]
fn every_field() {
    for (text, value) in [
        ("", ""),
        ("plain text", "plain text"),
        ("{client_ip}", "192.0.2.1"),
        ("{client_port}", "4000"),
        ("{listener}", "dns"),
        ("{qname}", "wWw.example"),
        ("{qname_label:1}", "wWw"),
        ("{qname_label:2}", "example"),
        ("{qname_label:3}", ""),
        ("{qtype}", "HTTPS"),
        ("{incoming:0xE1}", "in"),
        ("{incoming:224}-{incoming:0xe1}", "one-in"),
        ("{incoming:0x05}", ""),
        ("{edns:65001}", ""),
        ("{unique_id}", "000000000000000000000000000000000000"),
        ("{uuid}", "01234567-89ab-4def-8123-456789abcdef"),
        ("a{listener}b{{c}}{qtype}d", "adnsb{c}HTTPSd"),
        ("{{{listener}}}", "{dns}"),
        ("é{listener}", "édns"),
    ] {
        assert_eq!(rendered(text), value.as_bytes(), "{text}");
    }
}

#[test]
fn bytes_in_hexadecimal() {
    assert_eq!(rendered("hex:"), b"");
    assert_eq!(rendered("hex:01fF00"), [1, 0xff, 0]);
    assert_eq!(rendered("xhex:01"), b"xhex:01");
    assert_eq!(error("hex:0"), (5, TemplateErrorKind::HexOdd));
    assert_eq!(error("hex:00é0"), (7, TemplateErrorKind::HexDigit));
    assert_eq!(error("hex:{uuid}"), (5, TemplateErrorKind::HexDigit));
}

#[test]
fn errors_say_where() {
    use TemplateErrorKind::*;
    assert_eq!(error("ab{listener"), (3, Unclosed));
    assert_eq!(error("éé{listener{qname}"), (3, Unclosed));
    assert_eq!(error("{listener}}"), (11, LoneBrace));
    assert_eq!(error("{{}"), (3, LoneBrace));
    assert_eq!(error("{}"), (1, Unknown(String::new())));
    assert_eq!(error("{listener}{nosuch}"), (11, Unknown("nosuch".to_owned())));
    assert_eq!(error("{listener:1}"), (1, Argument("listener".to_owned())));
    for argument in ["", "256", "0x100", "0x", "E1", "+1", "-1", "0x+1"] {
        assert_eq!(error(&format!("{{incoming:{argument}}}")), (1, Incoming(argument.to_owned())));
    }
    assert_eq!(error("{incoming}"), (1, Incoming(String::new())));
    assert_eq!(error("-{sni:1}"), (2, Argument("sni".to_owned())));
    for number in ["", "0", "128", "+1", "x", "99999999999999999999"] {
        assert_eq!(error(&format!("{{qname_label:{number}}}")), (1, Label(number.to_owned())));
    }
    assert_eq!(error("{qname_label}"), (1, Label(String::new())));
}

#[test]
fn messages_can_be_understood() {
    let message = |text: &str| text.parse::<Template>().expect_err(text).to_string();
    assert_eq!(message("x{sni:a}"), "the field {sni} takes no argument (at character 2)");
    assert_eq!(message("{a"), "this field has no closing brace; a brace itself is written {{ (at character 1)");
}

#[test]
fn classes() {
    for (text, class) in [
        ("", Class::Static),
        ("text{listener}", Class::Static),
        ("{client_ip}{listener}", Class::PerClient),
        ("{client_port}", Class::PerClient),
        ("{client_ip}{qtype}", Class::PerQuery),
        ("{qname_label:1}", Class::PerQuery),
        ("{uuid}{qname}", Class::Unique),
    ] {
        assert_eq!(template(text).class(), class, "{text}");
    }
    let mut set = TlvSet::default();
    assert_eq!((set.class(), set.is_per_connection()), (Class::Static, false));
    for (text, class, per_connection) in [
        ("{client_ip}", Class::PerClient, false),
        ("{client_port}", Class::PerClient, true),
        ("{qname}", Class::PerQuery, true),
        ("fixed", Class::PerQuery, true),
        ("{uuid}", Class::Unique, true),
    ] {
        set.push(0xe0, template(text)).expect("a free type");
        assert_eq!((set.class(), set.is_per_connection()), (class, per_connection));
    }
}

#[test]
fn types_that_are_not_free() {
    for kind in 0..=u8::MAX {
        let free = !matches!(kind, 0x03 | 0x04 | 0x05 | 0x20 | 0xf8..);
        assert_eq!(TlvSet::default().push(kind, template("x")).is_ok(), free, "{kind:#04x}");
    }
}

#[test]
fn sets_are_written_in_order() {
    let mut set = TlvSet::default();
    for (kind, text) in [(0xe1, "{qtype}"), (0xe0, ""), (0xe1, "hex:00")] {
        set.push(kind, template(text)).expect("a free type");
    }
    let mut out = b"before".to_vec();
    set.render(&context(), &mut out);
    assert_eq!(out, b"before\xe1\0\x05HTTPS\xe0\0\0\xe1\0\x01\0");
}

#[test]
fn a_value_that_no_length_can_express_makes_no_header() {
    use crate::proxy_protocol::encode::HeaderWriter;
    let mut set = TlvSet::default();
    set.push(0xe0, template(&"x".repeat(65536))).expect("a free type");
    let mut out = Vec::new();
    assert!(HeaderWriter::local(&mut out).tlvs(&set, &context()).finish(usize::MAX).is_err());
    assert!(out.is_empty());
}

#[test]
fn without_a_question_its_fields_are_empty() {
    let context = Context { question: None, ..context() };
    let mut out = Vec::new();
    template("[{qname}{qname_label:1}{qtype}]").render(&context, &mut out);
    assert_eq!(out, b"[]");
}

#[test]
fn a_buffer_with_room_is_not_reallocated() {
    let mut set = TlvSet::default();
    for text in ["{client_ip}:{client_port}", "{listener}", "{qname}", "{qname_label:1}", "{qtype}", "{uuid}"] {
        set.push(0xe0, template(text)).expect("a free type");
    }
    let mut out = Vec::with_capacity(256);
    let place = out.as_ptr();
    set.render(&context(), &mut out);
    assert!(out.len() <= 256);
    assert_eq!((out.as_ptr(), out.capacity()), (place, 256));
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_at_a_place_in_it(text in r"[a-z{}:0-9é]{0,24}|\PC{0,40}") {
        crate::fuzzing::template(text.as_bytes());
    }

    #[test]
    fn escaped_text_is_itself(text in r"\PC{0,40}") {
        prop_assume!(!text.starts_with("hex:"));
        let escaped = text.replace('{', "{{").replace('}', "}}");
        prop_assert_eq!(rendered(&escaped), text.as_bytes());
    }
}

/// `a.` with an OPT record that has option 65001.
const WITH_EDNS: &[u8] =
    b"\0\x01\x01\0\0\x01\0\0\0\0\0\x01\x01a\0\0\x01\0\x01\0\0\x29\x04\xd0\0\0\0\0\0\x07\xfd\xe9\0\x03\0\xffz";

#[test]
fn an_option_of_the_query() {
    let question = first_question(WITH_EDNS).and_then(Result::ok);
    let mut out = Vec::new();
    template("[{edns:65001}|{edns:10}]").render(&Context { question, ..context() }, &mut out);
    assert_eq!(out, b"[\0\xffz|]");
    assert_eq!(template("{edns:65001}").class(), Class::PerQuery);
    for code in ["", "65536", "-1", "+1", "0x10", "a"] {
        assert_eq!(error(&format!("x{{edns:{code}}}")), (2, TemplateErrorKind::Edns(code.to_owned())));
    }
}

#[test]
fn the_identifier_of_the_connection_stands_alone() {
    assert_eq!(template("{unique_id}").class(), Class::Static);
    assert_eq!(template("{unique_id}").to_string(), "{unique_id}");
    assert_eq!(error("{unique_id:1}"), (1, TemplateErrorKind::Argument("unique_id".to_owned())));
    for (text, at) in [("a{unique_id}", 2), ("{unique_id}-{qname}", 1), ("{listener}{unique_id}", 11)] {
        assert_eq!(error(text), (at, TemplateErrorKind::NotAlone), "{text}");
    }
}
