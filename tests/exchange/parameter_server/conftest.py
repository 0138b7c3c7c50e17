from tests.exchange.parameter_server.test_run import solo

__all__ = ["solo"]
