import pytest
from fake_server import RawClient, fake_server, make_model_directory


@pytest.fixture(scope="session")
def model_directory(tiny_tokenizer_dir, tmp_path_factory):
    return make_model_directory(tiny_tokenizer_dir, tmp_path_factory.mktemp("fake-model"))


@pytest.fixture
def start_server(model_directory):
    def start(**options):
        return fake_server(model_directory, **options)

    return start


@pytest.fixture
def raw_client():
    clients = []

    def connect(server, **options):
        clients.append(RawClient(server.endpoint, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
