"""Scores beside the figures of the paper that they may be compared with, and beside none else."""

from dataclasses import replace

import pytest

from sora_hw.evaluation.tasks import COMMONSENSE, MATH, TASKS
from sora_hw.finished.beside_paper import GLUE, Measure, Sample, Setting, score_tables, tables_of
from sora_hw.finished.scores import ACCURACY, GENERATION, LIKELIHOOD, NORMALISED, STRICT, Score
from sora_hw.recipes import commonsense, glue, metamath

LLAMA = "meta-llama/Meta-Llama-3-8B"


def scores(kind, protocol=LIKELIHOOD, metric=ACCURACY, value=0.7) -> list[Score]:
    return [Score(protocol, task.name, metric, value, 100) for task in TASKS.values() if task.kind == kind]


def only(tables):
    assert len(tables) == 1
    return tables[0]


def cells(table, *keys):
    row = next(row for row in table.rows if row.keys == keys)
    return dict(zip(table.columns, row.cells, strict=True))


def test_commonsense_stands_beside_the_row_of_its_rank():
    """Table 3, rank 32: SORA has 86.53 on ARC-Easy and 78.06 on average, LoRA 71.87 on BoolQ."""
    table = only(score_tables(replace(commonsense.recipe(), rank=32), scores(COMMONSENSE)))
    assert table.title == f"commonsense, accuracy by likelihood, of {LLAMA}, beside the paper's Table 3"
    assert table.keys == ("rank", "method")
    assert table.columns == (
        *("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"),
        "average",
    )
    row = cells(table, "32", "sora")
    assert (row["ARC-e"].mean, row["ARC-e"].paper) == (pytest.approx(70.0), 86.53)
    assert (row["average"].mean, row["average"].paper) == (pytest.approx(70.0), 78.06)
    assert row["average"].difference == pytest.approx(-8.06)
    lora = only(score_tables(replace(commonsense.recipe(), rank=32, method="lora"), scores(COMMONSENSE)))
    assert cells(lora, "32", "lora")["BoolQ"].paper == 71.87
    assert not any("The paper's figures are of" in note for note in table.notes)


@pytest.mark.parametrize("change", [{"rank": 5}, {"rotation_rank": 2}, {"method": "full"}, {"method": "pre_ortho"}])
def test_what_the_paper_has_not_stands_alone(change):
    table = only(score_tables(replace(commonsense.recipe(), **change), scores(COMMONSENSE)))
    assert not table.rows[0].has_paper and "Table 3" not in table.title


def test_the_rotation_rank_means_nothing_without_a_rotation():
    recipe = replace(commonsense.recipe(), method="dora", rotation_rank=2)
    assert cells(only(score_tables(recipe, scores(COMMONSENSE))), "16", "dora")["PIQA"].paper == 76.33


def test_every_protocol_and_metric_has_its_table():
    both = [*scores(COMMONSENSE), *scores(COMMONSENSE, metric=NORMALISED), *scores(COMMONSENSE, GENERATION)]
    found = {
        table.title.partition(", of ")[0]: table.rows[0].has_paper for table in score_tables(commonsense.recipe(), both)
    }
    assert found == {
        "commonsense, accuracy by likelihood": True,
        "commonsense, accuracy normalised by length by likelihood": True,
        "commonsense, accuracy by generation": False,
    }


def test_math_stands_beside_generated_answers():
    """Table 4: SORA has 40.49 on AQuA, 78.96 on average and trains 0.47 %."""
    strict = Score(GENERATION, "AQuA", STRICT, 0.25, 254)
    plain, strictly = score_tables(metamath.recipe(), [*scores(MATH, GENERATION), strict], rate=0.4)
    row = cells(plain, "sora")
    assert (row["AQuA"].paper, row["average"].paper) == (40.49, 78.96)
    assert (row["trainable, %"].mean, row["trainable, %"].paper) == (0.4, 0.47)
    assert strictly.columns == ("AQuA",) and not strictly.rows[0].has_paper
    assert "Records scored: AQuA 254." in strictly.notes
    oft = only(score_tables(replace(metamath.recipe(), method="oft"), scores(MATH, GENERATION)))
    assert cells(oft, "oft")["GSM8K"].paper == 73.09


def test_an_average_stands_beside_that_of_the_same_tasks_alone():
    table = only(score_tables(commonsense.recipe(), scores(COMMONSENSE)[:3]))
    average = cells(table, "16", "sora")["average"]
    assert (average.mean, average.paper, average.difference) == (pytest.approx(70.0), None, None)
    assert only(score_tables(commonsense.recipe(), scores(COMMONSENSE)[:1])).columns == ("BoolQ",)


def test_no_average_where_a_task_is_missing():
    full = Setting(replace(glue.recipe("rte"), method="full"), {Measure(GLUE, "rte"): Sample((0.5,))})
    rte, cola = (Setting(glue.recipe(task), {Measure(GLUE, task): Sample((0.6, 0.8))}) for task in ("rte", "cola"))
    table = only(tables_of([full, cola, rte]))
    assert table.columns == ("RTE", "CoLA", "average") and [row.keys for row in table.rows] == [("sora",), ("full",)]
    assert cells(table, "full")["average"].mean is None and cells(table, "full")["CoLA"].ours_shown == "-"
    assert cells(table, "sora")["average"].mean == pytest.approx(70.0)
    assert cells(table, "sora")["RTE"].ours_shown == "70.00 ± 14.14"


def test_what_differs_from_the_paper_is_said():
    tuned = Setting(commonsense.embedded(), {Measure(MATH, "AQuA", "accuracy by generation"): Sample((0.2,), 10)})
    base = Setting(tuned.recipe, {Measure(MATH, "AQuA", "accuracy by generation"): Sample((0.1,), 10)}, tuned=False)
    table = only(tables_of([tuned, base]))
    assert table.keys == ("trained on", "method")
    assert [row.keys for row in table.rows] == [("-", "not tuned"), ("commonsense", "sora")]
    assert [row.has_paper for row in table.rows] == [False, True]
    assert (
        "The paper's figures are of google/gemma-7b trained on metamath, with rotations of rank 2; ours of embedded."
        in table.notes
    )
    other = replace(tuned, recipe=replace(tuned.recipe, rotation_rank=2))
    table = only(tables_of([other]))
    assert table.keys == ("trained on", "method", "rotation rank") and not table.rows[0].has_paper
    own = only(score_tables(commonsense.embedded(), scores(COMMONSENSE)))
    assert f"The paper's figures are of {LLAMA}; ours of embedded." in own.notes


def test_other_ranks_of_the_rotation_have_rows_and_a_table_of_their_own():
    """Table 6: rank 4 trains 1.81 %, scores 88.44, makes 1.82 steps a second; Table 2 is of rank 1."""
    settings = [
        Setting(
            replace(glue.recipe("rte"), rotation_rank=rank), {Measure(GLUE, "rte"): Sample((0.8,))}, True, rate, 2.0
        )
        for rank, rate in ((4, 1.8), (1, 1.5))
    ]
    second, sixth = tables_of(settings)
    assert second.keys == ("method", "rotation rank")
    assert cells(second, "sora", "1")["RTE"].paper == 87.90 and cells(second, "sora", "4")["RTE"].paper is None
    assert sixth.title.startswith("sora on RTE by the rank of its rotation") and sixth.title.endswith("Table 6")
    assert [row.keys for row in sixth.rows] == [("1",), ("4",)]
    row = cells(sixth, "4")
    assert [(cell.mean, cell.paper) for cell in row.values()] == [(1.8, 1.81), (80.0, 88.44), (2.0, 1.82)]
    cola = [replace(each, scores={Measure(GLUE, "cola"): Sample((0.8,))}) for each in settings]
    assert not any(row.has_paper for row in tables_of(cola)[1].rows), "Table 6 is of RTE"
