"""What curated data must be like before anything is trained on it: Great Expectations suites, as code.

Importing this module loads Great Expectations and pandas (seconds): only the validate stage does.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd
from great_expectations.data_context.types.base import ProgressBarsConfig

EXAMPLES = 20  # failing rows that are listed by place; the rest are counted
CURATE = "This should not happen after curate: run `dvc repro -f curate`, and report it if it stays."
SHORTEN = "Shorten these rows in data/, or raise the limit in params.yaml: validate."
ROLES = {"sft": r"^(?:system )?(?:user assistant ?)+$", "prompts": r"^(?:system )?(?:user assistant )*user$"}
# the replacement character, and every control but the line end: what a wrong encoding leaves behind
NOT_TEXT = "[\ufffd\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f]"


def said(checks: str, remedy: str) -> dict[str, dict[str, str]]:
    """What an expectation checks and what to do when it fails, in words for the report page."""
    return {"meta": {"checks": checks, "remedy": remedy}}


def table_suite(kind: str, min_chars: int, max_chars: int) -> gx.ExpectationSuite:
    """The suite of one kind of rows (pretrain, sft, prompts), whose frame has the columns that flows.validate makes."""
    content = "text" if kind == "pretrain" else "messages"
    whose = "each text" if kind == "pretrain" else "each message"
    suite = [
        gxe.ExpectColumnValuesToBeInSet(
            column="fields",
            value_set=[" ".join(sorted(["id", "source", content]))],
            **said(f"schema: every row has id, source and {content}", CURATE),
        ),
        gxe.ExpectColumnValuesToNotBeNull(column="id", **said("no row without an id", CURATE)),
        gxe.ExpectColumnValuesToNotBeNull(column="source", **said("no row without a source", CURATE)),
        gxe.ExpectColumnValuesToNotBeNull(column="content", **said("no row without content", CURATE)),
        gxe.ExpectColumnValuesToMatchRegex(
            column="id", regex="^[0-9a-f]{16}$", **said("ids are 16 hexadecimal digits", CURATE)
        ),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=["file", "id"], **said("no duplicates in a file", CURATE)),
        gxe.ExpectColumnValuesToBeBetween(
            column="shortest",
            min_value=min_chars,
            **said(f"{whose} has at least {min_chars} characters", "Lengthen or remove these rows in data/."),
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="longest", max_value=max_chars, **said(f"{whose} has at most {max_chars} characters", SHORTEN)
        ),
        gxe.ExpectColumnValuesToNotMatchRegex(
            column="content",
            regex=NOT_TEXT,
            **said("encoding: no replacement and no control characters", "Save the file as UTF-8 from its source."),
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="seen_in_training",
            value_set=[False],
            **said("no held-out row whose prompt or text occurs in training", CURATE),
        ),
    ]
    if kind in ROLES:
        end = "the assistant" if kind == "sft" else "the user"
        suite.append(
            gxe.ExpectColumnValuesToMatchRegex(
                column="roles",
                regex=ROLES[kind],
                **said(f"roles alternate, the user opens, {end} has the last word", CURATE),
            )
        )
    return gx.ExpectationSuite(name=kind, expectations=suite)


def files_suite() -> gx.ExpectationSuite:
    """The suite of the table of files: one row a file with `rows` and the `minimum` that is asked for."""
    remedy = "Add rows to data/, or lower validate.min_train_rows or validate.min_heldout_rows in params.yaml."
    return gx.ExpectationSuite(
        name="files",
        expectations=[
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="rows", column_B="minimum", or_equal=True, **said("every file has enough rows", remedy)
            )
        ],
    )


def quarantine_suite(max_rejected: int) -> gx.ExpectationSuite:
    """The suite of the quarantine: at most `max_rejected` rows."""
    remedy = "Mend the rows named on this page in data/, or allow more of them: validate.max_rejected in params.yaml."
    return gx.ExpectationSuite(
        name="quarantine",
        expectations=[
            gxe.ExpectTableRowCountToBeBetween(
                max_value=max_rejected, **said(f"at most {max_rejected} unreadable rows", remedy)
            )
        ],
    )


def check(frame: pd.DataFrame, suite: gx.ExpectationSuite) -> dict[str, Any]:
    """Validate `frame` (with columns file and line, to name rows by) against `suite`.

    Returns {"name", "success", "rows", "expectations": [{"checks", "remedy", "type", "success", "observed", "unexpected",
    "examples": [{"file", "line", "value"}]}]}: plain values, no times, no ids, in the order of the suite.
    """
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("memory").add_dataframe_asset(suite.name)
    batch = asset.add_batch_definition_whole_dataframe("whole").get_batch(batch_parameters={"dataframe": frame})
    wanted = {"result_format": "COMPLETE", "unexpected_index_column_names": ["file", "line"]}
    order = [expectation.meta["checks"] for expectation in suite.expectations]
    results = [_plain(result) for result in batch.validate(suite, result_format=wanted).to_json_dict()["results"]]
    results.sort(key=lambda result: order.index(result["checks"]))
    success = all(result["success"] for result in results)
    return {"name": suite.name, "success": success, "rows": len(frame), "expectations": results}


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """One result of Great Expectations, less what changes from run to run."""
    config, found = result["expectation_config"], result["result"]
    raised = result["exception_info"]
    if "raised_exception" not in raised:  # then it holds one entry for each metric that failed
        raised = next(iter(raised.values()), {})
    rows = sorted(found.get("unexpected_index_list") or [], key=lambda row: (row["file"], row["line"]))
    examples = [
        {
            "file": row["file"],
            "line": row["line"],
            "value": " ".join(str(value)[:200] for name, value in row.items() if name not in ("file", "line")),
        }
        for row in rows[:EXAMPLES]
    ]
    return {
        "checks": config["meta"]["checks"],
        "remedy": config["meta"]["remedy"],
        "type": config["type"],
        "success": bool(result["success"]),
        "observed": raised.get("exception_message") or found.get("observed_value"),
        "unexpected": int(found.get("unexpected_count") or 0),
        "examples": examples,
    }
