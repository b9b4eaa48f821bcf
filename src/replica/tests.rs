#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test's failure is a panic")]

use std::collections::BTreeMap;

use super::*;
use crate::stats::FollowerState;

fn at(us: u64) -> Moment {
    Moment::at(us)
}

fn life(system: &str, started: &str) -> Rc<Incarnation> {
    Rc::new(Incarnation { system_identifier: system.into(), started: started.into(), address: started.into() })
}

fn primary(sent: u64, position: u64) -> PrimarySample {
    PrimarySample { sent: at(sent), life: life("s", "p"), timeline: 3, position: Position::new(position) }
}

fn follower(heard: u64, position: u64) -> FollowerSample {
    FollowerSample {
        heard: at(heard),
        life: life("s", "f"),
        in_recovery: true,
        timeline: Some(3),
        position: Some(Position::new(position)),
        agrees: true,
    }
}

/// Something that happens to a group.
type Event = Box<dyn Fn(&mut Group)>;

fn group(count: usize) -> Group {
    Group::new(vec![1; count], Policy::default())
}

fn chosen(group: &mut Group, now: u64, need: Need) -> Result<usize, Missing> {
    group.choose(at(now), need, None, |_| 0).map(|(at, _)| at)
}

#[test]
fn positions_are_two_hexadecimal_numbers() {
    #[rustfmt::skip]
    let table: [(&str, Option<u64>); 9] = [
        ("0/0",         Some(0)),
        ("16/B374D848", Some(0x16_B374_D848)),
        ("FFFFFFFF/ffffffff", Some(u64::MAX)),
        ("1/",          None),
        ("/1",          None),
        ("1",           None),
        ("1/100000000", None),
        ("+1/1",        None),
        ("1/1/1",       None),
    ];
    for (text, want) in table {
        assert_eq!(Position::parse(text.as_bytes()), want.map(Position::new), "{text}");
    }
}

#[test]
fn a_watermark_wants_a_follower_that_has_replayed_it_on_its_own_timeline() {
    let own = |started: &str, sample| FollowerSample { life: life("7301", started), ..sample };
    let begin = || {
        let mut group = group(2);
        assert!(group.primary(&PrimarySample { life: life("7301", "p"), ..primary(10, 300) }));
        for (at, position) in [(0, 100), (1, 200)] {
            assert_eq!(group.follower(at, &own(&format!("f{at}"), follower(20, position))), Next::Done);
        }
        group
    };
    let mark = |system_identifier, timeline, bytes| {
        Some(Watermark { system_identifier, timeline, position: Position::new(bytes) })
    };
    #[rustfmt::skip]
    let table: [(&str, Option<Watermark>, Need, Result<usize, Missing>); 8] = [
        ("none",                    None,               Need::Nothing,     Ok(0)),
        ("both have it",            mark(7301, 3, 100), Need::Nothing,     Ok(0)),
        ("one has it",              mark(7301, 3, 101), Need::Nothing,     Ok(1)),
        ("all that it has",         mark(7301, 3, 200), Need::Nothing,     Ok(1)),
        ("none has it",             mark(7301, 3, 201), Need::Nothing,     Err(Missing::Fresh)),
        ("has it, and is too old",  mark(7301, 3, 200), Need::Within(100), Err(Missing::Fresh)),
        ("another timeline",        mark(7301, 2, 1),   Need::Nothing,     Err(Missing::Fresh)),
        ("another server",          mark(7302, 3, 1),   Need::Nothing,     Err(Missing::Fresh)),
    ];
    for (name, watermark, need, want) in table {
        assert_eq!(begin().choose(at(30), need, watermark, |_| 0).map(|(at, _)| at), want, "{name}");
    }
    // What it has replayed in one life says nothing of the next.
    let mut group = begin();
    assert_eq!(group.follower(1, &own("again", follower(40, 90))), Next::Done);
    assert_eq!(group.choose(at(50), Need::Nothing, mark(7301, 3, 101), |_| 0).err(), Some(Missing::Fresh));
}

#[test]
fn a_follower_covers_the_latest_moment_whose_position_it_has_replayed() {
    let mut group = group(1);
    for (sent, position) in [(10, 100), (20, 200), (30, 200), (40, 300)] {
        assert!(group.primary(&primary(sent, position)));
    }
    #[rustfmt::skip]
    let table: [(&str, u64, Need, bool); 8] = [
        ("behind all",              99,  Need::After(None),          false),
        ("behind all, any will do", 99,  Need::Nothing,              true),
        ("the first",               100, Need::After(None),          true),
        ("the first, in time",      100, Need::After(Some(at(9))),   true),
        ("the same moment is not later", 199, Need::After(Some(at(10))), false),
        ("the later of equals",     200, Need::After(Some(at(29))),  true),
        ("all of it",               300, Need::After(Some(at(39))),  true),
        ("not more than all",       300, Need::After(Some(at(40))),  false),
    ];
    for (name, position, need, want) in table {
        assert_eq!(group.follower(0, &follower(50, position)), Next::Done, "{name}");
        assert_eq!(chosen(&mut group, 60, need).is_ok(), want, "{name}");
    }
    assert_eq!(chosen(&mut group, 60, Need::Within(20)), Ok(0));
    assert_eq!(chosen(&mut group, 61, Need::Within(20)), Err(Missing::Fresh));
    // What it has, it keeps.
    group.follower(0, &follower(70, 250));
    assert_eq!(chosen(&mut group, 80, Need::After(Some(at(39)))), Ok(0));
}

#[test]
fn the_header_of_a_page_lies_between_no_follower_and_its_primary() {
    const FILE: u64 = 16 * 1024 * 1024;
    #[rustfmt::skip]
    let table: [(&str, u64, u64, bool); 8] = [
        ("of a file",             FILE,          FILE + 40,          true),
        ("of a page",             FILE + 65_536, FILE + 65_536 + 24, true),
        ("that and a record",     FILE,          FILE + 40 + 24,     false),
        ("a page's and a record", FILE + 65_536, FILE + 65_536 + 48, false),
        ("a short record",        FILE - 8,      FILE + 40,          false),
        ("in a page",             FILE + 8,      FILE + 40,          false),
        ("perhaps in a page",     FILE + 8192,   FILE + 8192 + 24,   false),
        ("nowhere",               0,             40,                 false),
    ];
    for (name, replayed, position, want) in table {
        let mut group = Group::new(vec![1], Policy { max_lag_bytes: Some(1), max_lag_us: None });
        group.primary(&primary(10, position));
        assert_eq!(group.follower(0, &follower(20, replayed)), Next::Done, "{name}");
        assert_eq!(chosen(&mut group, 30, Need::After(None)).is_ok(), want, "{name}");
        assert_eq!(group.gauges(0, at(30)).lag_bytes == Some(0), want, "{name}");
    }
    // One that is past the primary comes from elsewhere all the same.
    let mut group = group(1);
    group.primary(&primary(10, FILE - 8));
    assert_eq!(group.follower(0, &follower(20, FILE)), Next::AskPrimary);
}

#[test]
fn what_was_told_is_not_relied_on_for_ever() {
    let mut group = group(1);
    assert_eq!(chosen(&mut group, 0, Need::Nothing), Err(Missing::Fresh));
    group.primary(&primary(10, 100));
    group.follower(0, &follower(20, 100));
    assert_eq!(chosen(&mut group, 20 + 5 * SECOND, Need::Nothing), Ok(0));
    assert_eq!(chosen(&mut group, 21 + 5 * SECOND, Need::Nothing), Err(Missing::Fresh));
}

#[test]
fn only_what_is_proven_to_follow_serves() {
    use FollowerState as State;

    let plain = || follower(20, 100);
    let of = |system: &str, started: &str| life(system, started);
    #[rustfmt::skip]
    let table: Vec<(&str, FollowerSample, State)> = vec![
        ("a follower",            plain(),                                                          State::Serving),
        ("one behind",            FollowerSample { position: Some(Position::new(1)), ..plain() },   State::Serving),
        ("promoted",              FollowerSample { in_recovery: false, ..plain() },                 State::Primary),
        ("the primary itself",    FollowerSample { in_recovery: false, life: of("s", "p"), ..plain() }, State::Primary),
        ("unrelated",             FollowerSample { life: of("t", "f"), ..plain() },                 State::OtherSystem),
        ("one that tells nothing", FollowerSample { life: of("", ""), ..plain() },                  State::OtherSystem),
        ("follows a fork",        FollowerSample { timeline: Some(4), ..plain() },                  State::OtherHistory),
        ("left behind, or slow to tell", FollowerSample { timeline: Some(2), ..plain() },           State::Unshown),
        ("tells no timeline",     FollowerSample { timeline: None, ..plain() },                     State::Unshown),
        ("understands otherwise", FollowerSample { agrees: false, ..plain() },                      State::OtherSettings),
        ("has replayed nothing",  FollowerSample { position: None, ..plain() },                     State::Unknown),
    ];
    for (name, sample, want) in table {
        let mut group = group(1);
        group.primary(&primary(10, 100));
        assert_eq!(group.follower(0, &sample), Next::Done, "{name}");
        assert_eq!(group.gauges(0, at(20)).state, want, "{name}");
        let serves = |group: &mut Group, need| chosen(group, 20, need).is_ok();
        assert_eq!(serves(&mut group, Need::Nothing), matches!(want, State::Serving | State::Unshown), "{name}");
        assert_eq!(serves(&mut group, Need::Within(SECOND)), want == State::Serving && name != "one behind", "{name}");
        assert_eq!(serves(&mut group, Need::After(None)), want == State::Serving && name != "one behind", "{name}");
    }
}

#[test]
fn one_that_is_past_the_primary_has_another_history_for_as_long_as_it_lives() {
    let mut group = group(1);
    group.primary(&primary(10, 100));
    let ahead = follower(20, 150);
    assert_eq!(group.follower(0, &ahead), Next::AskPrimary);
    // The primary went on meanwhile.
    group.primary(&primary(20, 150));
    assert_eq!(group.follower(0, &ahead), Next::Done);
    assert_eq!(group.gauges(0, at(30)).state, FollowerState::Serving);

    let ahead = follower(30, 999);
    assert_eq!(group.follower(0, &ahead), Next::AskPrimary);
    group.primary(&primary(31, 160));
    assert_eq!(group.follower(0, &ahead), Next::Done);
    assert_eq!(group.gauges(0, at(40)).state, FollowerState::OtherHistory);
    assert_eq!(chosen(&mut group, 40, Need::Nothing), Err(Missing::Usable));
    // The primary's position grows past it.
    group.primary(&primary(50, 2000));
    group.follower(0, &follower(60, 1000));
    assert_eq!(group.gauges(0, at(60)).state, FollowerState::OtherHistory);
    // It was made a follower again.
    group.follower(0, &FollowerSample { life: life("s", "later"), ..follower(70, 1000) });
    assert_eq!(group.gauges(0, at(70)).state, FollowerState::Serving);
}

#[test]
fn two_names_of_one_server_are_one_follower() {
    let mut group = group(2);
    group.primary(&primary(10, 100));
    let other_way = Rc::new(Incarnation { address: "another".into(), ..(*life("s", "f")).clone() });
    group.follower(0, &follower(20, 100));
    group.follower(1, &FollowerSample { life: other_way, ..follower(20, 100) });
    assert_eq!(group.gauges(0, at(20)).state, FollowerState::Serving);
    assert_eq!(group.gauges(1, at(20)).state, FollowerState::Twin);
}

#[test]
fn all_is_void_when_primary_or_follower_begins_another_life() {
    let ready = || {
        let mut group = group(1);
        group.primary(&primary(10, 100));
        group.follower(0, &follower(20, 100));
        let (_, seat) = group.choose(at(20), Need::After(None), None, |_| 0).unwrap();
        assert!(group.vouches(seat, &life("s", "f")));
        assert!(!group.vouches(seat, &life("s", "another")));
        (group, seat)
    };
    let elsewhere = |timeline| PrimarySample { life: life("s", "q"), timeline, ..primary(30, 100) };
    let table: [(&str, Event, bool); 8] = [
        ("nothing new", Box::new(|group| assert!(group.primary(&primary(30, 100)))), true),
        ("primary restarted", Box::new(move |group| assert!(group.primary(&elsewhere(3)))), false),
        ("primary promoted", Box::new(move |group| assert!(group.primary(&elsewhere(4)))), false),
        ("the old primary is still there", Box::new(move |group| assert!(!group.primary(&elsewhere(2)))), true),
        (
            "primary on another timeline",
            Box::new(|group| {
                assert!(group.primary(&PrimarySample { timeline: 4, ..primary(30, 100) }));
            }),
            false,
        ),
        ("primary gone back", Box::new(|group| assert!(group.primary(&primary(30, 99)))), false),
        ("primary in recovery", Box::new(Group::forget), false),
        (
            "follower came back behind",
            Box::new(|group| {
                group.follower(0, &FollowerSample { life: life("s", "g"), ..follower(30, 50) });
            }),
            false,
        ),
    ];
    for (name, event, want) in table {
        let (mut group, seat) = ready();
        event(&mut group);
        assert_eq!(group.vouches(seat, &life("s", "f")), want, "{name}");
        assert_eq!(chosen(&mut group, 40, Need::After(None)).is_ok(), want, "{name}");
    }
}

#[test]
fn what_was_written_elsewhere_is_not_covered() {
    let mut group = group(1);
    group.wrote_on(&life("s", "p"));
    group.primary(&primary(10, 100));
    group.follower(0, &follower(20, 100));
    assert_eq!(chosen(&mut group, 20, Need::After(Some(at(5)))), Ok(0));
    group.wrote_on(&life("s", "new"));
    assert_eq!(chosen(&mut group, 20, Need::After(Some(at(5)))), Err(Missing::Fresh));
    // The old one is asked again, and still says yes.
    group.primary(&primary(30, 100));
    group.follower(0, &follower(40, 100));
    assert_eq!(chosen(&mut group, 40, Need::After(Some(at(25)))), Err(Missing::Fresh));
    group.primary(&PrimarySample { life: life("s", "new"), timeline: 4, ..primary(50, 100) });
    group.follower(0, &FollowerSample { timeline: Some(4), ..follower(60, 100) });
    assert_eq!(chosen(&mut group, 60, Need::After(Some(at(45)))), Ok(0));
    assert!(!group.primary(&primary(70, 100)), "the old one is known to be old");
}

#[test]
fn one_too_far_behind_is_out_until_it_has_caught_up_by_half() {
    let policy = Policy { max_lag_us: Some(10 * SECOND), max_lag_bytes: Some(1000) };
    #[rustfmt::skip]
    let steps: [(&str, u64, u64, bool); 6] = [
        ("level",              20_000, 20_000, false),
        ("at the limit",       21_000, 20_000, false),
        ("beyond it",          21_001, 20_000, true),
        ("within it",          21_001, 20_100, true),
        ("within half of it",  21_001, 20_501, false),
        ("beyond half of it",  22_000, 21_001, false),
    ];
    let mut group = Group::new([1], policy);
    let mut now = 0;
    for (name, of_primary, of_follower, want) in steps {
        now += 10;
        group.primary(&primary(now, of_primary));
        group.follower(0, &follower(now + 1, of_follower));
        let lagging = group.gauges(0, at(now + 1)).state == FollowerState::Lagging;
        assert_eq!(lagging, want, "{name}");
        assert_eq!(chosen(&mut group, now + 1, Need::Nothing).is_err(), want, "{name}");
    }
    // By time: the primary was there twelve seconds ago.
    group.primary(&primary(now + 12 * SECOND, 22_100));
    group.follower(0, &follower(now + 12 * SECOND, 22_000));
    assert_eq!(group.gauges(0, at(now + 12 * SECOND)).state, FollowerState::Lagging);
    assert_eq!(group.gauges(0, at(now)).lag_us, Some(12 * SECOND));
}

#[test]
fn one_that_failed_is_out_until_it_answers_after_a_pause_and_comes_back_slowly() {
    let mut group = group(2);
    group.primary(&primary(10, 100));
    let both = |group: &mut Group, now: u64| {
        group.primary(&primary(now, 100));
        for (one, started) in ["f", "g"].into_iter().enumerate() {
            if group.is_due(one, at(now)) {
                group.follower(one, &FollowerSample { life: life("s", started), ..follower(now, 100) });
            }
        }
    };
    both(&mut group, 20);
    // Many reads fail at once, which is one failure.
    for _ in 0..10 {
        group.failed(0, at(30), 0);
    }
    assert!(group.is_out(0) && !group.is_due(0, at(30 + 49_999)));
    assert!((0..20).all(|_| chosen(&mut group, 40, Need::Nothing) == Ok(1)));
    both(&mut group, 30 + 100_000);
    assert!(!group.is_out(0));
    let shares = |group: &mut Group, now: u64| {
        let all: Vec<usize> = (0..1700).filter_map(|_| chosen(group, now, Need::Nothing).ok()).collect();
        all.iter().filter(|at| **at == 0).count()
    };
    let slowly = shares(&mut group, 30 + 100_000);
    assert!((90..=110).contains(&slowly), "{slowly} of 1700 where a sixteenth is due");
    both(&mut group, 11 * SECOND);
    let fully = shares(&mut group, 11 * SECOND);
    assert!((840..=860).contains(&fully), "{fully} of 1700 where half is due");

    // Pauses double, up to half a minute.
    let (mut now, mut pauses) = (12 * SECOND, Vec::new());
    for _ in 0..12 {
        group.failed(0, at(now), 0);
        let begun = now;
        while !group.is_due(0, at(now)) {
            now += 10_000;
        }
        pauses.push((now - begun) / 10_000);
        both(&mut group, now);
    }
    assert_eq!(pauses[..4], [5, 10, 20, 40]);
    assert_eq!(pauses[11], 1500);
}

#[test]
fn reads_go_where_there_is_least_to_do_for_the_weight() {
    let mut group = Group::new([1, 3], Policy::default());
    group.primary(&primary(10, 100));
    group.follower(0, &follower(20, 100));
    group.follower(1, &FollowerSample { life: life("s", "g"), ..follower(20, 100) });
    #[rustfmt::skip]
    let table: [(&str, [u32; 2], usize); 4] = [
        ("the first is idle",   [0, 1], 0),
        ("the second is idle",  [1, 0], 1),
        ("three times as much", [1, 2], 1),
        ("and more",            [1, 4], 0),
    ];
    for (name, load, want) in table {
        let got = group.choose(at(20), Need::Nothing, None, |at| load[at]).map(|(at, _)| at);
        assert_eq!(got, Ok(want), "{name}");
    }
    let mut counts: BTreeMap<usize, u32> = BTreeMap::new();
    for _ in 0..400 {
        *counts.entry(chosen(&mut group, 20, Need::Nothing).unwrap()).or_insert(0) += 1;
    }
    assert!(counts[&0].abs_diff(100) <= 2, "{counts:?}");
}

#[test]
fn a_history_is_bounded_and_coarser_the_older_it_is() {
    const STEP: u64 = SECOND / 100;
    let mut history = History::new(SECOND);
    for step in 1..=10_000 {
        assert!(history.note(at(step * STEP), Position::new(step)));
    }
    assert_eq!(history.latest(), Some((at(10_000 * STEP), Position::new(10_000))));
    assert_eq!(history.covered_by(Position::new(9_990)), Some(at(9_990 * STEP)));
    // Never later than what is true, and never much earlier.
    for step in 1..=10_000 {
        let covered = history.covered_by(Position::new(step));
        assert!(covered.is_none_or(|covered| covered <= at(step * STEP)), "{step}: {covered:?}");
        let (lag, real) = (history.lag(Position::new(step)), (10_000 - step) * STEP);
        assert!(lag >= real.min(60 * SECOND) && lag <= real + 2 * SECOND, "{step}: {lag} for {real}");
    }
    // Overtaken answers change nothing; what is past a position does not come back to it.
    assert!(history.note(at(1), Position::new(1)));
    assert_eq!(history.latest(), Some((at(10_000 * STEP), Position::new(10_000))));
    assert!(!history.note(at(10_001 * STEP), Position::new(9_999)));
}
