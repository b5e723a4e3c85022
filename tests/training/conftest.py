"""What tests of several modules train on."""

from pathlib import Path

import pytest
from pictures import write_products


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures in catalog/ and others/; run folders of the tests lie beside them."""
    home = tmp_path_factory.mktemp("folders")
    write_products(home / "catalog", range(6))
    write_products(home / "others", range(100, 130))
    return home
