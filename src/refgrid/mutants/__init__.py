"""Fault injection: faults planted into references and adapters, and the demand that each turns a case red."""
