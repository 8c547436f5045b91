"""docs/api.md is made from the program. tests/runs/test_service.py runs the tutorial in docs/service.md."""

from sdft.services.serving.http.reference import page
from tests.papers.documents import ROOT


def test_the_page_of_the_interface_is_made_from_it() -> None:
    """After a change: python -m sdft.services.serving.http.reference > docs/api.md"""
    assert (ROOT / "docs" / "api.md").read_text() == page()
