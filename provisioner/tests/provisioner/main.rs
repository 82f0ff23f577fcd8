//! The provisioner with its real router, real database and real cloud client; only the cloud itself is a fake that can be told to fail.

mod cloud_client;
mod crash;
mod deprovision;
mod enrolment;
mod ensure;
mod fake_cloud;
mod http_shape;
mod plan_properties;
mod rig;
mod store;
