"""What a run will need before anybody rents a GPU: memory, bytes on the wire, time, fees."""
