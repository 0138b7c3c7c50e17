"""What the service is called, for both sides."""

SERVICE = "dptrain.v1.ParameterServerService"

METHODS = ("GetJob", "Join", "Lend", "Leave", "Work", "Push", "Pull", "Follow")
