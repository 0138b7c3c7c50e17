"""Workers and servers that meet over gRPC, without MPI."""
