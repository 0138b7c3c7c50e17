"""The ground of everything that talks over gRPC: addresses, who may connect, limits, errors on the wire, and the two
factories that put them together. ``grpc`` is imported here, in the generated code, and by what uses the factories.
"""
