from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from headless_browser import Browser, find_browser
from report_runs import NASTY, rollouts, write_run

from megatron_dgrpo.cli import main
from megatron_dgrpo.errors import DataError
from megatron_dgrpo.observe.report.history import MAX_POINTS, read_history, thinned
from megatron_dgrpo.observe.report.overview import mixture, phases, status
from megatron_dgrpo.observe.report.page import gather, page, write_report
from megatron_dgrpo.observe.report.rollouts import Rollouts, evenly, shortened


def records(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(number: int, step: int, **values: Any) -> dict[str, Any]:
    return {"time": 1.0, "stage": "sft" if number == 0 else "dgrpo", "stage_number": number, "step": step} | values


# ---- the figures ----


def test_all_stages_are_on_one_axis_and_updates_share_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        records(row(0, 1, loss=3.0), row(0, 2, loss=2.0), row(1, 0, **{"heldout/reward": 0.1}))
        + records(*(row(1, step, update=update, loss=step + update / 10) for step in (1, 2) for update in (1, 2)))
    )
    history = read_history(path, [("sft", 2), ("dgrpo", 5)])
    assert history.curve("loss") == ([1, 2, 2.5, 3, 3.5, 4], [3.0, 2.0, 1.1, 1.2, 2.1, 2.2])
    assert history.curve("heldout/reward") == ([2], [0.1])
    assert [(s.kind, s.begins, s.steps, s.done) for s in history.stages] == [("sft", 0, 2, 2), ("dgrpo", 2, 5, 2)]
    assert history.notes == []


def test_steps_that_were_made_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(records(*(row(0, step, loss=loss) for step, loss in ((1, 5), (2, 4), (3, 3), (2, 40), (3, 30)))))
    history = read_history(path, [])
    assert history.curve("loss") == ([1, 2, 3], [5, 40, 30])
    assert any("2 records were made again" in note for note in history.notes)


def test_what_is_torn_damaged_or_not_finite_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        records(row(0, 1, loss="NaN", x="text"), row(0, 2, loss=1.0)).encode()
        + b'\xff\n{"step": 3}\n[]\n'
        + b'{"stage_number": 0, "st'
    )
    history = read_history(path, [("sft", 9)])
    assert history.curve("loss") == ([1, 2], [None, 1.0]) and history.curve("x")[0] == [1, 2]
    assert [note.split(" ")[0] for note in history.notes] == ["3", "The"]
    assert "no record yet" in read_history(Path("/dev/null"), []).notes[0]
    assert "no metrics.jsonl" in read_history(tmp_path / "none", []).notes[0]


def test_a_long_curve_keeps_its_peaks_gaps_and_ends() -> None:
    x = [float(i) for i in range(50_000)]
    y: list[float | None] = [0.0] * 50_000
    y[0], y[-1], y[31_415], y[27_182], y[100] = 5.0, 6.0, 99.0, -99.0, None
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) <= MAX_POINTS and kept_x == sorted(kept_x)
    found = dict(zip(kept_x, kept_y, strict=True))
    assert (found[0.0], found[49_999.0], found[31_415.0], found[27_182.0], found[100.0]) == (
        5.0,
        6.0,
        99.0,
        -99.0,
        None,
    )
    assert thinned(x[:MAX_POINTS], y[:MAX_POINTS]) == (x[:MAX_POINTS], y[:MAX_POINTS])


def test_phases_add_up_to_the_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    times = {"time/generate": 6.0, "time/train": 3.0, "time/step": 10.0}
    evaluation = row(1, 4, **{"heldout/reward": 0.5, "time/generate": 50.0, "time/step": 55.0})
    path.write_text(records(*(row(1, step, loss=1.0, **times) for step in range(1, 5)), evaluation))
    found = phases(read_history(path, []))
    assert found["names"] == ["generate", "train", "other"] and found["totals"] == [24.0, 12.0, 4.0]
    assert found["evaluation"] == 55.0 and found["bars"][0] == {"from": 1, "to": 1, "seconds": [6.0, 3.0, 1.0]}


def test_the_mixture_is_each_stages_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [row(n, s, **{"mixture/a": 0.2 + n / 10 + s / 100, "mixture/b": 0.5}) for n in (0, 1) for s in (1, 2)]
    path.write_text(records(*rows))
    assert mixture(read_history(path, []))["totals"] == [
        ["1. sft", "a", pytest.approx(0.22)], ["1. sft", "b", 0.5],
        ["2. dgrpo", "a", pytest.approx(0.32)], ["2. dgrpo", "b", 0.5],
    ]  # fmt: skip


def test_how_the_run_ended() -> None:
    start, end = {"kind": "start"}, {"kind": "end", "words": "ended well"}
    failure = {"kind": "failure", "words": "rank1 was killed"}
    assert status([start, end], 1.0) == ("done", "")
    assert status([start, failure], 1.0) == ("failed", "rank1 was killed")
    state, words = status([start, failure, start], 1.0)
    assert state == "open" and "goes on, or was killed" in words, "it was started again"
    assert status([], None)[0] == "open"


# ---- the page ----


def test_rollouts_are_spread_over_the_run_and_long_ones_lose_their_middle() -> None:
    items = rollouts(1000)
    chosen = evenly(items, 10)
    assert len(chosen) == 10 and chosen[0] is items[0] and chosen[-1] is items[-1]
    text = shortened("a" * 50_000 + "z" * 50_000, 1000)
    assert text.startswith("a" * 500) and text.endswith("z" * 500) and "99,000 characters" in text


def test_the_page_asks_for_nothing_and_nothing_of_the_run_is_html(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run & co", sft_steps=3, dgrpo_steps=5)
    text = write_report(run, None, Rollouts(rollouts(3))).read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;run &amp; co" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[a-z/]""", text.split('id="data"')[0])
    assert "http://www.w3.org/2000/svg" in text and len(re.findall(r"https?://", text)) == 1
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert NASTY in data["rollouts"]["items"][0]["response"]
    assert "config.yaml" not in str(data["notes"])


@pytest.mark.parametrize("lacking", ["config.yaml", "metrics.jsonl", "events.jsonl", "environment.json"])
def test_a_file_that_is_missing_or_damaged_is_no_end(tmp_path: Path, lacking: str) -> None:
    run = write_run(tmp_path / "run", sft_steps=3, dgrpo_steps=5)
    (run / lacking).write_bytes(b"\xff{[: \n - torn")
    assert page(gather(run))
    (run / lacking).unlink()
    data = gather(run)
    assert page(data)
    if lacking in ("config.yaml", "metrics.jsonl"):
        assert any(lacking in note for note in data["notes"])


def test_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sft_steps=3, dgrpo_steps=5)
    heavy = ("torch", "transformers", "tokenizers", "vllm", "megatron")
    program = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\nfrom megatron_dgrpo.cli import main\n"
        f"sys.exit(main(['report', {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "r.html") and (tmp_path / "r.html").stat().st_size > 20_000


# ---- in a browser ----

in_a_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed (Debian: chromium)")


@in_a_browser
def test_a_run_of_a_thousand_steps_opens_fast_without_an_error(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run"), None, Rollouts(rollouts()))
    assert report.stat().st_size < 10e6
    program = find_browser()
    assert program is not None
    with Browser(program) as browser:
        for width in (1280, 390):
            browser.size(width)
            seconds = min(browser.open(report), browser.open(report))  # the first one starts the browser's processes
            assert seconds < 2.0
            assert browser.messages == [] and {r.split(":")[0] for r in browser.requests} == {"file"}
            assert browser.value("window.hit") is None
            _is_legible(browser, width)
        _shows_what_the_run_had(browser)
        browser.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 5_000


def _is_legible(browser: Browser, width: int) -> None:
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing is beside the page"
    sizes = browser.value(
        "[...document.querySelectorAll('svg text, td, p, .label, pre')]"
        ".map(n => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 11
    outside = browser.value(
        "[...document.querySelectorAll('.card svg')].flatMap(svg => { const card = svg.closest('.card')"
        ".getBoundingClientRect(); return [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect())"
        ".filter(b => b.left < card.left || b.right > card.right + 1) }).length"
    )
    assert outside == 0, "labels of axes stay in their cards"
    overlaps = browser.value(
        "[...document.querySelectorAll('.card svg')].filter(svg => { const b = [...svg.querySelectorAll('text')]"
        ".map(t => t.getBoundingClientRect()); return b.some((a, i) => b.slice(i + 1).some(c => a.left < c.right && "
        "c.left < a.right && a.top + 2 < c.bottom && c.top + 2 < a.bottom)) }).length"
    )
    assert overlaps == 0, "no two labels of a chart overlap"


def _shows_what_the_run_had(browser: Browser) -> None:
    titles = browser.value("[...document.querySelectorAll('h2')].map(n => n.textContent)")
    assert titles == ["Learning", "Is it sound?", "Balance of the terms", "By position", "Where the time goes",
                      "The mixture that was seen", "Rollouts", "Events", "What was run"]  # fmt: skip
    charts = browser.value("[...document.querySelectorAll('h3')].map(n => n.textContent)")
    expected = ("Reward", "KL to the teacher", "Entropy of the policy", "Learning rate",
                "Tokens whose gradient is clipped away", "Norm of each term's gradient")  # fmt: skip
    for title in expected:
        assert title in charts
    assert browser.value("document.querySelectorAll('.rollout').length") == 10
    assert "response 1 " + NASTY[:30] in browser.value("document.querySelector('.rollout').textContent")
    # a search, an order
    browser.value("var find = document.querySelector('input[type=search]'); find.value = 'response 1 '; find.oninput()")
    assert browser.value("document.querySelectorAll('.rollout').length") == 1
    browser.value("var order = document.querySelector('select[aria-label=Order]'); find.value = ''")
    browser.value("order.value = 'high'; order.onchange()")
    assert browser.value("document.querySelector('.rollout header').textContent").count("exact_match 1") == 1
    # values where the pointer is
    browser.value("var plot = document.querySelector('.plot'); plot.scrollIntoView({block: 'center'})")
    place = browser.value("(b => ({x: b.left + b.width * 0.9, y: b.top + 60}))(plot.getBoundingClientRect())")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    tip = browser.value("plot.querySelector('.tip').textContent")
    assert "2. dgrpo, step 7" in tip and "rollouts" in tip and "held out" in tip
    # everything else is drawn when it is asked for
    before = browser.value("document.querySelectorAll('svg').length")
    browser.value("document.querySelector('details.folded').open = true")
    browser.value("new Promise(done => setTimeout(done, 200))")
    assert browser.value("document.querySelectorAll('svg').length") > before
    assert browser.messages == []


@in_a_browser
def test_a_run_that_has_just_begun_or_has_failed_opens_too(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("stages: [{kind: sft, steps: 10}]\n")
    one = write_run(tmp_path / "one", sft_steps=1, dgrpo_steps=0, end="failure")
    bad = write_run(tmp_path / "bad", sft_steps=2, dgrpo_steps=2)
    (bad / "metrics.jsonl").write_text(records(*(row(0, s, loss="NaN", lr=0.0, grad_norm="Infinity") for s in (1, 2))))
    program = find_browser()
    assert program is not None
    with Browser(program) as browser:
        browser.size(390)
        for run, words in ((begun, "no metrics.jsonl"), (one, "rank1 was killed"), (bad, "Learning rate")):
            browser.open(write_report(run))
            assert browser.messages == [], run
            assert words in browser.value("document.body.innerText")
            _is_legible(browser, 390)
