"""Files for people who come to the repository: citation, issue forms, security."""

from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"

pytestmark = pytest.mark.skipif(not FORMS.is_dir(), reason="not a checkout: the distribution has no such files")


def test_the_citation_is_of_the_software_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Oh", "Kim", "Kim", "Chi", "Kim"]
    assert paper["url"] == "https://arxiv.org/abs/2506.02015"


@pytest.mark.parametrize("name", ["bug", "performance", "question"])
def test_an_issue_form_asks_for_the_environment(name: str) -> None:
    form = yaml.safe_load((FORMS / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert "ospo-fast env" in fields["env"]["attributes"]["label"]
    assert fields["env"]["validations"] == {"required": True}


def test_security_links_to_a_private_report_and_to_the_promises() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "](../../security/advisories/new)" in text
    assert "](docs/security.md)" in text
