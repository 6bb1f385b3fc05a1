"""The contract of every store, as tests: subclass `StoreContract`.

Override `open_store` and `open_store_at`. Needs pytest with pytest-asyncio in its auto mode (or mark your subclass
`pytest.mark.asyncio`).
"""

from orchestrator.testing.store_contract.copies import CopyContract
from orchestrator.testing.store_contract.documents import DocumentContract, LeaseContract
from orchestrator.testing.store_contract.log import LogContract, PersistenceContract


class StoreContract(DocumentContract, LeaseContract, LogContract, CopyContract, PersistenceContract):
    """The suite for the contract of `orchestrator.protocols.Store`."""
