"""Records on disk are the records in memory; an entry of the cache is whole, or made anew."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data import DataConfig, Message, Preference, Renderer, check, prepare
from dpo.data import shelf as shelves
from dpo.data.load import RECORDS
from dpo.data.shelf import ENTRY_FILE, OnDisk, Shelf, cached, digest, pick
from dpo.errors import DataError

ROWS = [{"prompt": f"prompt {n}", "chosen": f"good {n}", "rejected": "bad", "group": f"g{n % 3}"} for n in range(30)]


def record(n: int) -> Preference:
    return Preference(prompt=(Message("user", f"p {n}"),), completions=("a", "b"), scores=(1.0, 0.0), source=f"f:{n}")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ten records be too many for memory, and write them in batches of four."""
    monkeypatch.setattr(shelves, "IN_MEMORY", 10)
    monkeypatch.setattr(shelves, "_BATCH", 4)


def on_disk(folder: Path, count: int) -> OnDisk[Preference]:
    shelf = Shelf(folder / "records.arrow", RECORDS)
    for n in range(count):
        shelf.add(record(n))
    shelf.spill()
    shelf.close()
    return OnDisk(folder / "records.arrow", RECORDS, "x")


def build(parts):
    for n in range(25):
        parts["records"].add(record(n))
    return {"said": 7}


@pytest.mark.usefixtures("few")
class TestSequences:
    def test_they_are_the_records(self, tmp_path):
        found, expected = on_disk(tmp_path, 23), [record(n) for n in range(23)]
        assert list(found) == expected
        assert found == expected
        assert found != expected[:-1]
        assert [found[n] for n in range(23)] == expected
        assert found[-1] == expected[-1]
        assert found[3:9:2] == expected[3:9:2]
        with pytest.raises(IndexError):
            found[23]

    def test_some_of_them_in_any_order(self, tmp_path):
        found = on_disk(tmp_path, 23)
        places = [22, 0, 5, 6, 4, 13]
        assert list(pick(found, places)) == [record(n) for n in places]
        assert list(pick(pick(found, places), [1, 3])) == [record(0), record(6)]
        assert pick([record(0), record(1)], [1]) == (record(1),)

    def test_equal_records_have_one_name_and_others_another(self, tmp_path):
        found = on_disk(tmp_path, 23)
        assert digest(found) == digest(on_disk(tmp_path, 23))
        names = {digest(found), digest(found.take([0, 1])), digest(found.take([1, 0])), digest(found[:5])}
        assert len(names) == 4
        assert digest((record(1),)) == digest([record(1)]) != digest((record(2),))

    @settings(max_examples=40, deadline=None)
    @given(
        st.builds(
            Preference,
            prompt=st.lists(
                st.builds(
                    Message,
                    role=st.sampled_from(["system", "user", "assistant", "tool"]),
                    content=st.text(),
                    extra=st.sampled_from(["", '{"tool_call_id": "7"}']),
                )
            ).map(tuple),
            completions=st.just(("a", "b")),
            scores=st.none() | st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
            agreement=st.none() | st.floats(0.5, 1),
            weight=st.floats(0, 1e6),
            group=st.none() | st.text(),
            feedback=st.lists(st.text()).map(tuple),
            source=st.text(),
        )
    )
    def test_every_record_is_the_same_as_a_row(self, given):
        import pyarrow

        table = pyarrow.Table.from_pylist([RECORDS.to_row(given)], schema=RECORDS.schema())
        assert RECORDS.from_row(table.to_pylist()[0]) == given


@pytest.mark.usefixtures("few")
class TestCache:
    def test_few_records_leave_nothing_on_disk(self, own_cache_folder):
        def three(parts):
            for n in range(3):
                parts["records"].add(record(n))
            return {}

        assert cached(["a"], {"records": RECORDS}, three)[0]["records"] == tuple(record(n) for n in range(3))
        assert not own_cache_folder.exists()

    def test_many_are_made_once(self):
        made = []

        def counted(parts):
            made.append(1)
            return build(parts)

        for _ in range(2):
            parts, plain = cached(["a", 1], {"records": RECORDS}, counted)
            assert isinstance(parts["records"], OnDisk)
            assert parts["records"] == [record(n) for n in range(25)]
            assert plain == {"said": 7}
        assert len(made) == 1
        cached(["a", 2], {"records": RECORDS}, counted)
        assert len(made) == 2

    def test_other_code_makes_them_anew(self, monkeypatch):
        cached(["a"], {"records": RECORDS}, build)
        monkeypatch.setattr(shelves, "_code", lambda: "another version")
        with pytest.raises(ZeroDivisionError):
            cached(["a"], {"records": RECORDS}, lambda _: 1 / 0)

    @pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "entry"])
    def test_a_damaged_entry_is_made_anew_and_said(self, own_cache_folder, caplog, harm):
        cached(["a"], {"records": RECORDS}, build)
        (file,) = own_cache_folder.glob("*/records.arrow")
        if harm == "flip":
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.write_bytes(raw)
        elif harm == "truncate":
            file.write_bytes(file.read_bytes()[:500])
        elif harm == "remove":
            file.unlink()
        else:
            (file.parent / ENTRY_FILE).write_text("{")
        with caplog.at_level(logging.WARNING, "dpo"):
            assert cached(["a"], {"records": RECORDS}, build)[0]["records"] == [record(n) for n in range(25)]
        assert "damaged" in caplog.text
        caplog.clear()
        cached(["a"], {"records": RECORDS}, lambda _: 1 / 0)
        assert not caplog.records

    def test_what_fails_half_way_leaves_nothing(self, own_cache_folder):
        def fails(parts):
            build(parts)
            raise DataError("row 26 is rotten")

        with pytest.raises(DataError, match="row 26"):
            cached(["a"], {"records": RECORDS}, fails)
        assert list(own_cache_folder.iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "file"))
        with pytest.raises(DataError, match="Set DPO_LAB_CACHE to another folder"):
            cached(["a"], {"records": RECORDS}, build)


@pytest.mark.usefixtures("few")
class TestThroughTheFrontDoor:
    def test_a_large_file_is_the_same_as_in_memory(self, write_rows, chatml, monkeypatch):
        config = DataConfig(train=write_rows(ROWS), eval_share=0.3, per_prompt=1)
        checked = check(config)
        assert isinstance(checked.train, OnDisk)
        assert isinstance(checked.eval, OnDisk)
        large = prepare(checked, chatml, "judgements", mismatched=True)
        monkeypatch.setattr(shelves, "IN_MEMORY", 1000)
        monkeypatch.setenv("DPO_LAB_CACHE", "/nonexistent")
        small = prepare(config, chatml, "judgements", mismatched=True)
        assert isinstance(large.train, OnDisk)
        assert isinstance(small.train, tuple)
        assert (list(large.train), list(large.eval)) == (list(small.train), list(small.eval))
        assert (large.fingerprint, large.report) == (small.fingerprint, small.report)

    def test_tokenised_once_until_something_it_depends_on_changes(
        self, write_rows, chatml, make_tokenizer, monkeypatch
    ):
        path = write_rows(ROWS)
        rendered = []

        def count(self, *given):
            rendered.append(1)
            return original(self, *given)

        original = Renderer.render
        monkeypatch.setattr(Renderer, "render", count)

        def again(tokenizer=chatml, view="pairs", **settings):
            rendered.clear()
            prepared = prepare(DataConfig(train=path, **settings), tokenizer, view)
            return len(rendered), prepared.fingerprint

        first, fingerprint = again()
        assert first == 30
        assert again() == (0, fingerprint)
        assert again(max_length=500)[0] == 30
        assert again(view="judgements")[0] == 30
        assert again(eval_share=0.4)[0] == 30
        assert (
            again(tokenizer=make_tokenizer("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"))[0] == 30
        )
        assert again() == (0, fingerprint)
        Path(path).write_text(json.dumps({**ROWS[0], "chosen": "another"}) + "\n" + Path(path).read_text())
        assert again()[0] == 31


@pytest.fixture
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DPO_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"
