-- Roles for a store in database "pydedup" of MariaDB or MySQL. Run it as who may create roles; for
-- another database or other names, replace them. It may hold tables of yours too, but then these
-- roles reach them as well: privileges of MySQL are for a database or for one table.
--
--   pydedup_owner    creates the store, and migrates it when pydedup is upgraded
--   pydedup_writer   adds, removes, vacuums
--   pydedup_reader   serves, loads, verifies; can change nothing
--
-- Give each user one of them:
--   CREATE USER serving IDENTIFIED BY '...';
--   GRANT pydedup_reader TO serving;
--   SET DEFAULT ROLE pydedup_reader FOR serving;    (MySQL says TO instead of FOR)

CREATE DATABASE IF NOT EXISTS pydedup CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

CREATE ROLE pydedup_owner;
GRANT CREATE, CREATE VIEW, DROP, INDEX, ALTER ON pydedup.* TO pydedup_owner;
GRANT SELECT, INSERT, UPDATE, DELETE ON pydedup.* TO pydedup_owner;

CREATE ROLE pydedup_writer;
GRANT SELECT, INSERT, UPDATE, DELETE ON pydedup.* TO pydedup_writer;

CREATE ROLE pydedup_reader;
GRANT SELECT ON pydedup.* TO pydedup_reader;
