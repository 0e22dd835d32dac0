"""Whatever is given as a configuration, a recipe or data is taken whole or refused in the way that programs expect."""

import json
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sora_hw import ConditionedConfig
from sora_hw.conditioning import POST, PRE, PRESETS
from sora_hw.data.files import SUFFIXES, read_rows
from sora_hw.data.prompts import prompt, training_text
from sora_hw.data.records import Record, read_records
from sora_hw.errors import DataError, UserError
from sora_hw.recipes import commonsense, glue

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
words = st.sampled_from([*PRESETS, "none", "diagonal", "rotation", "magnitude", "taylor", "exp", "bounded", "all"])
FIELDS = [field.name for field in fields(ConditionedConfig)]


@quick
@example({"method": []})
@example({"method": {}})
@example({"rotation": []})
@example({"init_weights": {}})
@example({"alpha": 10**400})
@given(st.dictionaries(st.sampled_from(FIELDS), json_values | words, max_size=3))
def test_a_configuration_is_made_or_refused(given):
    try:
        config = ConditionedConfig(**given)
    except ValueError:
        return
    assert config.r >= 1 and 0 <= config.dropout < 1 and config.rotation_eps > 0
    assert config.pre in PRE and config.post in POST


@quick
@given(
    st.sampled_from([*PRESETS]),
    st.integers(1, 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 1, exclude_max=True),
)
def test_a_saved_configuration_is_read_back_as_it_was(tmp_path, method, r, alpha, dropout):
    config = ConditionedConfig(method=method, r=r, alpha=alpha, dropout=dropout, target_modules=["q_proj"])
    config.save_pretrained(str(tmp_path))
    assert ConditionedConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.parametrize("recipe", [commonsense.recipe(), glue.recipe()], ids=["commonsense", "glue"])
@quick
@given(data=st.data())
def test_a_recipe_is_made_or_refused(recipe, data):
    free = [field for field in fields(recipe) if "group" in field.metadata]
    field = data.draw(st.sampled_from(free))
    kinds = {int: st.integers(), float: st.floats(), bool: st.booleans(), str: st.text(max_size=8)}
    kinds |= {int | None: st.none() | st.integers(), tuple[str, ...]: st.lists(st.text(max_size=8)).map(tuple)}
    value = data.draw(kinds[field.type])
    try:
        made = replace(recipe, **{field.name: value})
    except UserError as error:
        assert str(error).startswith("--")
        return
    assert asdict(made) == asdict(recipe) | {field.name: value}


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
filled = texts.filter(str.strip)
records = st.builds(Record, filled, texts, filled, texts, filled)


@quick
@given(records)
def test_a_prompt_holds_its_record_word_for_word(record):
    text = training_text(record)
    assert text == prompt(record, for_training=True) + record.output
    assert record.instruction in text and record.input in text
    assert ("### Input:" in text) >= bool(record.input)
    assert prompt(record, for_training=False).split() == prompt(record, for_training=True).split()


@quick
@given(st.lists(records, min_size=1, max_size=5))
def test_records_are_read_as_they_were_written(tmp_path, records):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(asdict(record)) for record in records))
    (tmp_path / "a.json").write_text(json.dumps([asdict(record) for record in records]))
    assert read_records([tmp_path / "a.jsonl"]) == read_records([tmp_path / "a.json"]) == records


@quick
@given(st.dictionaries(st.sampled_from([*asdict(Record("", "", "", "")), "query", "response"]), json_values))
def test_a_record_is_read_or_refused(tmp_path, values):
    (tmp_path / "a.jsonl").write_text(json.dumps(values))
    try:
        (record,) = read_records([tmp_path / "a.jsonl"])
    except DataError as error:
        assert "a.jsonl: line 1: " in str(error)
        return
    assert all(isinstance(value, str) for value in vars(record).values()) and record.instruction.strip()


@quick
@given(st.sampled_from(SUFFIXES), st.binary(max_size=200))
def test_any_bytes_are_rows_or_refused(tmp_path, suffix, content):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    try:
        rows = read_rows([file])
    except DataError as error:
        assert str(error).startswith(f"{file}: ")
        return
    assert rows and all(row.source == str(file) for row in rows)
